// NumPy's files: .npy holds one array, .npz is an archive of them by name.
// Sources: numpy.lib.format (version 1.0 to 3.0); PKWARE's APPNOTE.TXT for the archive, stored without compression.
#include "core/base/json.h"
#include "core/tensor/check.h"
#include "lua/bind/bind.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>

namespace moe::lua {
namespace {
using at::Tensor;

struct NpyType {
    const char* code;
    at::ScalarType type;
};
constexpr NpyType kTypes[] = {{"<f4", at::kFloat}, {"<f8", at::kDouble}, {"<f2", at::kHalf}, {"<i8", at::kLong}, {"<i4", at::kInt},
                              {"<i2", at::kShort}, {"|i1", at::kChar},   {"|u1", at::kByte}, {"|b1", at::kBool}};
constexpr std::string_view kMagic = "\x93NUMPY";

void write_file(const std::string& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(bytes.data(), std::streamsize(bytes.size()));
    file.flush();
    MOE_CHECK(file.good(), io, path, "a file that cannot be written", "a writable path and room on the disk", "");
}
[[noreturn]] void broken(const std::string& path, const std::string& got) { MOE_THROW(data, path, got, "a whole .npy array of numbers in this machine's byte order", ""); }

/// Text after `'key':` in the header's dictionary.
std::string header_value(const std::string& path, const std::string& header, const std::string& key) {
    size_t at = header.find("'" + key + "'");
    if (at != std::string::npos) at = header.find(':', at);
    if (at == std::string::npos) broken(path, "a header without " + key);
    size_t start = header.find_first_not_of(' ', at + 1);
    return start == std::string::npos ? "" : header.substr(start);
}

Tensor parse_npy(const std::string& path, std::string_view bytes) {
    if (bytes.size() < 10 || !bytes.starts_with(kMagic)) broken(path, "another kind of file");
    bool wide = bytes[6] >= 2;
    size_t start = wide ? 12 : 10, length = 0;
    if (bytes.size() < start) broken(path, "a file that was cut off");
    for (size_t i = 0; i < start - 8; ++i) length |= size_t(uint8_t(bytes[8 + i])) << (8 * i);
    if (bytes.size() - start < length) broken(path, "a file that was cut off");
    std::string header(bytes.substr(start, length));
    std::string_view values = bytes.substr(start + length);

    std::string code = header_value(path, header, "descr");
    code = code.size() > 2 ? code.substr(1, code.find(code[0], 1) - 1) : code;
    const NpyType* type = nullptr;
    for (auto& t : kTypes) {
        if (code == t.code || (code.size() == 3 && code[0] == '=' && code.substr(1) == t.code + 1)) type = &t;
    }
    MOE_CHECK(type, dtype, path, "dtype " + code, "f2, f4, f8, i1, i2, i4, i8, u1 or b1, little-endian", "numpy's astype converts");
    bool fortran = header_value(path, header, "fortran_order").starts_with("True");
    std::string dims = header_value(path, header, "shape");
    if (dims.empty() || dims[0] != '(') broken(path, "a header without a shape");
    std::vector<int64_t> shape;
    for (size_t i = 1; i < dims.size() && dims[i] != ')';) {
        if (!isdigit(uint8_t(dims[i]))) {
            ++i;
            continue;
        }
        int64_t n = 0;
        for (; i < dims.size() && isdigit(uint8_t(dims[i])); ++i) {
            if (n > (int64_t(1) << 56)) broken(path, "a shape too large");
            n = n * 10 + (dims[i] - '0');
        }
        shape.push_back(n);
    }
    size_t need = at::elementSize(type->type);
    for (int64_t n : shape) {
        if (n > 0 && need > (size_t(1) << 60) / size_t(n)) broken(path, "a shape too large");
        need *= size_t(n);
    }
    if (values.size() < need) broken(path, fmt::format("{} bytes for {}", values.size(), shape_text(shape)));
    std::vector<int64_t> stored = shape;
    if (fortran) std::reverse(stored.begin(), stored.end());
    Tensor t = at::empty(stored, type->type);
    if (need) std::memcpy(t.data_ptr(), values.data(), need);
    if (!fortran) return t;
    std::vector<int64_t> order(shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(order.size() - 1 - i);
    return t.permute(order);
}

std::string npy_bytes(const std::string& op, const Tensor& given) {
    const NpyType* type = nullptr;
    for (auto& t : kTypes) {
        if (t.type == given.scalar_type()) type = &t;
    }
    MOE_CHECK(type, dtype, op, dtype_text(given.scalar_type()), "a dtype that NumPy has", "t:float(); moe.save_safetensors keeps every dtype");
    Tensor t = given.detach().cpu().contiguous();
    std::string dims;
    for (int64_t n : t.sizes()) dims += std::to_string(n) + (t.dim() == 1 ? "," : ", ");
    if (t.dim() > 1) dims.resize(dims.size() - 2);
    std::string header = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", type->code, dims);
    header.append(63 - (10 + header.size()) % 64, ' ');       // values start at a multiple of 64
    header += '\n';
    std::string out(kMagic);
    out += {'\1', '\0', char(header.size() & 255), char(header.size() >> 8)};
    out += header;
    if (t.nbytes()) out.append(static_cast<const char*>(t.data_ptr()), t.nbytes());
    return out;
}

// --- the archive ---

uint32_t crc32(std::string_view bytes) {
    static const auto table = [] {
        std::array<uint32_t, 256> t{};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            t[i] = c;
        }
        return t;
    }();
    uint32_t c = 0xFFFFFFFFu;
    for (char b : bytes) c = table[(c ^ uint8_t(b)) & 255] ^ (c >> 8);
    return ~c;
}
void put(std::string& out, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out += char(value >> (8 * i) & 255);
}
uint64_t get(const std::string& path, std::string_view bytes, size_t at, int count) {
    if (at + size_t(count) > bytes.size()) MOE_THROW(data, path, "an archive that was cut off", "a whole .npz", "");
    uint64_t value = 0;
    for (int i = 0; i < count; ++i) value |= uint64_t(uint8_t(bytes[at + size_t(i)])) << (8 * i);
    return value;
}
constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50;
constexpr uint64_t kMostBytes = 0xFFFFFFFF;

int save_npy(lua_State* L) {
    std::string path = check_string(L, 1, "path");
    save_as_npy("moe.save_npy", path, check_tensor(L, 2, "t"));
    return 0;
}
int load_npy(lua_State* L) {
    std::string path = check_string(L, 1, "path");
    return push_tensor(L, parse_npy(path, read_text(path)));
}
int save_npz(lua_State* L) {
    std::string path = check_string(L, 1, "path"), out, directory;
    check_table(L, 2, "tensors");
    uint64_t count = 0;
    for (auto& name : ordered_keys(L, 2)) {
        lua_getfield(L, 2, name.c_str());
        std::string bytes = npy_bytes("moe.save_npz: " + name, check_tensor(L, lua_gettop(L), ("tensors." + name).c_str())), file = name + ".npy";
        lua_pop(L, 1);
        uint64_t start = out.size();
        MOE_CHECK(start + bytes.size() + 1024 < kMostBytes, usage, "moe.save_npz", "more than 4 GiB", "less", "moe.save_safetensors has no limit");
        auto header = [&](std::string& to) {
            put(to, 20, 2), put(to, 0, 2), put(to, 0, 2), put(to, 0, 2), put(to, 0x21, 2);      // version, flags, stored, time, date: 1 January 1980
            put(to, crc32(bytes), 4), put(to, bytes.size(), 4), put(to, bytes.size(), 4), put(to, file.size(), 2), put(to, 0, 2);
        };
        put(out, kLocal, 4), header(out), out += file, out += bytes;
        put(directory, kCentral, 4), put(directory, 20, 2), header(directory), put(directory, 0, 2), put(directory, 0, 2), put(directory, 0, 2), put(directory, 0, 4), put(directory, start, 4);
        directory += file;
        ++count;
    }
    uint64_t start = out.size();
    out += directory;
    put(out, kEnd, 4), put(out, 0, 2), put(out, 0, 2), put(out, count, 2), put(out, count, 2), put(out, directory.size(), 4), put(out, start, 4), put(out, 0, 2);
    write_file(path, out);
    return 0;
}
int load_npz(lua_State* L) {
    std::string path = check_string(L, 1, "path"), bytes = read_text(path);
    size_t end = bytes.rfind("PK\5\6");
    MOE_CHECK(end != std::string::npos, data, path, "no archive", "an .npz file", "");
    uint64_t count = get(path, bytes, end + 10, 2), at = get(path, bytes, end + 16, 4);
    std::vector<std::pair<std::string, Tensor>> tensors;
    std::vector<std::string> names;
    for (uint64_t i = 0; i < count; ++i) {
        MOE_CHECK(get(path, bytes, at, 4) == kCentral, data, path, "a broken directory", "a whole .npz", "");
        uint64_t method = get(path, bytes, at + 10, 2), crc = get(path, bytes, at + 16, 4), size = get(path, bytes, at + 20, 4);
        uint64_t name_size = get(path, bytes, at + 28, 2), extra = get(path, bytes, at + 30, 2), comment = get(path, bytes, at + 32, 2), local = get(path, bytes, at + 42, 4);
        if (at + 46 + name_size > bytes.size()) MOE_THROW(data, path, "an archive that was cut off", "a whole .npz", "");
        std::string name = bytes.substr(at + 46, name_size);
        MOE_CHECK(method == 0, data, path + ": " + name, "a compressed array", "an archive that is not compressed", "numpy.savez writes one, savez_compressed does not");
        MOE_CHECK(size < kMostBytes && local < kMostBytes, data, path + ": " + name, "an archive of more than 4 GiB", "less", "");
        uint64_t start = local + 30 + get(path, bytes, local + 26, 2) + get(path, bytes, local + 28, 2);
        if (start + size > bytes.size()) MOE_THROW(data, path, "an archive that was cut off", "a whole .npz", "");
        std::string_view file = std::string_view(bytes).substr(start, size);
        MOE_CHECK(crc32(file) == crc, data, path + ": " + name, "bytes that were changed", "bytes that fit the checksum", "");
        if (name.ends_with(".npy")) name.resize(name.size() - 4);
        tensors.emplace_back(name, parse_npy(path + ": " + name, file));
        names.push_back(name);
        at += 46 + name_size + extra + comment;
    }
    push_ordered_table(L, names);
    for (auto& [name, tensor] : tensors) {
        push_tensor(L, tensor);
        lua_setfield(L, -2, name.c_str());
    }
    return 1;
}

const Binding kFunctions[] = {
    {"save_npy", save_npy, "moe.save_npy(path, t): writes a tensor as NumPy's .npy; bfloat16, which NumPy has not, only after t:float()."},
    {"load_npy", load_npy,
     "moe.load_npy(path): the array of an .npy file, a tensor on the host.\n"
     "Example: local path = os.tmpname(); moe.save_npy(path, moe.arange(3)); print(moe.load_npy(path)); os.remove(path)"},
    {"save_npz", save_npz, "moe.save_npz(path, {name = t, …}): writes tensors by name as NumPy's .npz, not compressed."},
    {"load_npz", load_npz,
     "moe.load_npz(path): name → tensor of an .npz file that is not compressed.\n"
     "Example: local path = os.tmpname(); moe.save_npz(path, {a = moe.arange(3)}); print(moe.load_npz(path).a); os.remove(path)"},
};
}  // namespace

void save_as_npy(const std::string& op, const std::string& path, const Tensor& t) { write_file(path, npy_bytes(op, t)); }

void open_npy(lua_State* L) { set_functions(L, "moe.", kFunctions); }
}  // namespace moe::lua
