#include "core/store/safetensors.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <ATen/ATen.h>

#include <cstring>
#include <filesystem>

using namespace moe;
using moe::test::error_of;
using namespace moe::store;

namespace {
std::string file_bytes(const std::string& header, size_t data_bytes) {
    uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes + header + std::string(data_bytes, '\1');
}

NamedTensors one_of_each() {
    NamedTensors tensors;
    for (auto dtype : {at::kByte, at::kDouble, at::kBFloat16, at::kLong, at::kBool, at::kFloat, at::kShort, at::kHalf, at::kInt, at::kChar, at::kFloat8_e4m3fn, at::kFloat8_e5m2})
        tensors.emplace_back(fmt::format("t.{}", c10::toString(dtype)), at::arange(15).sub(4).view({3, 1, 5}).to(dtype));
    tensors.emplace_back("scalar", at::scalar_tensor(2.5, at::kDouble));
    tensors.emplace_back("empty", at::empty({3, 0}, at::kFloat));
    tensors.emplace_back("strided", at::arange(12, at::kFloat).view({3, 4}).t());
    return tensors;
}

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
    at::Tensor x = a.contiguous(), y = b.contiguous();
    return x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() && (x.numel() == 0 || std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0);
}
}  // namespace

TEST_CASE("safetensors: every dtype, shape and stride comes back", "[store]") {
    test::Folder folder;
    auto tensors = one_of_each();
    save_safetensors(folder / "a.safetensors", tensors, {{"format", "pt"}, {"note", "\"ü\""}});
    SafetensorsFile file(folder / "a.safetensors");
    REQUIRE(file.names().size() == tensors.size());
    for (const auto& [name, tensor] : tensors) {
        REQUIRE(file.info(name).dtype == tensor.scalar_type());
        REQUIRE(file.info(name).shape == tensor.sizes().vec());
        REQUIRE(same_bytes(file.get(name), tensor));
    }
    REQUIRE(file.metadata().at("note") == "\"ü\"");
    REQUIRE(!file.contains("other"));
    REQUIRE(error_of([&] { file.get("other"); }).kind() == ErrorKind::data);
    int num_files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) num_files += entry.exists();
    REQUIRE(num_files == 1);   // no temporary file is left
}

TEST_CASE("safetensors: a tensor outlives its file object, and changing it leaves the file alone", "[store]") {
    test::Folder folder;
    save_safetensors(folder / "a.safetensors", {{"x", at::arange(1000, at::kFloat)}});
    at::Tensor x = SafetensorsFile(folder / "a.safetensors").get("x");
    x.add_(1);
    REQUIRE(x.sum().item<float>() == 500500);
    REQUIRE(SafetensorsFile(folder / "a.safetensors").get("x").sum().item<float>() == 499500);
    save_safetensors(folder / "a.safetensors", {{"x", at::zeros({3})}});   // over a file that is mapped
    REQUIRE(x.sum().item<float>() == 500500);
}

TEST_CASE("safetensors: a tensor that is not aligned is read right", "[store]") {
    test::Folder folder;
    std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
    std::string bytes = file_bytes(header, 1);
    float values[] = {1.5f, -2.5f};
    bytes.append(reinterpret_cast<const char*>(values), 8);
    folder.write("a.safetensors", bytes);
    at::Tensor f = SafetensorsFile(folder / "a.safetensors").get("f");
    REQUIRE(f[0].item<float>() == 1.5f);
    REQUIRE(f[1].item<float>() == -2.5f);
}

TEST_CASE("safetensors: damaged and foreign files are errors that name the file", "[store]") {
    test::Folder folder;
    auto entry = [](const char* dtype, const char* shape, const char* offsets) {
        return std::string(R"({"x":{"dtype":")") + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
    };
    const std::string two = R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":)";
    std::vector<std::pair<std::string, std::string>> cases = {
        {"empty file", ""},
        {"short", "abc"},
        {"header longer than the file", file_bytes("{}", 0).substr(0, 9)},
        {"enormous header", std::string("\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10)},
        {"header over the limit", std::string("\x00\xe1\xf5\x06\x00\x00\x00\x00{}", 10)},
        {"not JSON", file_bytes("hello", 0)},
        {"not an object", file_bytes("[1]", 0)},
        {"not UTF-8", file_bytes("{\"\xff\":1}", 0)},
        {"entry is no object", file_bytes("{\"x\":3}", 0)},
        {"no dtype", file_bytes(R"({"x":{"shape":[1],"data_offsets":[0,1]}})", 1)},
        {"unknown dtype", file_bytes(entry("F4", "[2]", "[0,1]"), 1)},
        {"negative shape", file_bytes(entry("U8", "[-1]", "[0,1]"), 1)},
        {"overflowing shape", file_bytes(entry("F32", "[4611686018427387904,4]", "[0,0]"), 0)},
        {"shape is text", file_bytes(entry("U8", "[\"a\"]", "[0,1]"), 1)},
        {"offsets past the end", file_bytes(entry("U8", "[4]", "[0,4]"), 3)},
        {"offsets the wrong way", file_bytes(entry("U8", "[0]", "[4,0]"), 4)},
        {"negative offset", file_bytes(entry("U8", "[4]", "[-4,0]"), 4)},
        {"huge offset", file_bytes(entry("U8", "[4]", "[18446744073709551612,18446744073709551615]"), 4)},
        {"one offset", file_bytes(entry("U8", "[4]", "[4]"), 4)},
        {"size is not the shape's", file_bytes(entry("F32", "[4]", "[0,4]"), 4)},
        {"bytes behind the data", file_bytes(entry("U8", "[4]", "[0,4]"), 5)},
        {"overlap", file_bytes(two + "[2,6]}}", 6)},
        {"gap", file_bytes(two + "[5,9]}}", 9)},
        {"name twice", file_bytes(R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1)},
        {"metadata is no text", file_bytes(R"({"__metadata__":{"a":1}})", 0)},
    };
    for (const auto& [what, bytes] : cases) {
        INFO(what);
        folder.write("a.safetensors", bytes);
        Error e = error_of([&] { SafetensorsFile(folder / "a.safetensors"); });
        REQUIRE(e.kind() == ErrorKind::data);
        REQUIRE(std::string(e.what()).find("a.safetensors") != std::string::npos);
    }
    REQUIRE(error_of([&] { SafetensorsFile(folder / "none"); }).kind() == ErrorKind::io);
    REQUIRE(error_of([&] { SafetensorsFile(folder.path()); }).kind() == ErrorKind::io);
}

TEST_CASE("safetensors: a file cut at any byte is refused", "[store]") {
    test::Folder folder;
    save_safetensors(folder / "a.safetensors", {{"x", at::arange(3)}, {"y", at::ones({2, 2})}});
    auto size = std::filesystem::file_size(folder / "a.safetensors");
    while (size > 0) {
        std::filesystem::resize_file(folder / "a.safetensors", --size);
        REQUIRE(error_of([&] { SafetensorsFile(folder / "a.safetensors"); }).kind() == ErrorKind::data);
    }
}

TEST_CASE("safetensors: full disks, missing folders and repeated names are errors, the old file stays", "[store]") {
    test::Folder folder;
    Error full = error_of([] { save_safetensors("/dev/full", {{"x", at::ones({2048})}}); });
    REQUIRE(full.kind() == ErrorKind::io);
    REQUIRE(full.parts().hint.find("full") != std::string::npos);
    REQUIRE(error_of([&] { save_safetensors(folder / "none/a.safetensors", {{"x", at::ones({2})}}); }).kind() == ErrorKind::io);
    save_safetensors(folder / "a.safetensors", {{"x", at::ones({2})}});
    REQUIRE(error_of([&] { save_safetensors(folder / "a.safetensors", {{"x", at::ones({2})}, {"x", at::ones({2})}}); }).kind() == ErrorKind::usage);
    REQUIRE(error_of([&] { save_safetensors(folder / "a.safetensors", {{"x", at::ones({2}, at::kComplexFloat)}}); }).kind() == ErrorKind::dtype);
    REQUIRE(error_of([&] { save_safetensors(folder / "a.safetensors", {{"x", at::Tensor()}}); }).kind() == ErrorKind::usage);
    REQUIRE(SafetensorsFile(folder / "a.safetensors").get("x").sum().item<float>() == 2);
    std::filesystem::create_directories(folder / "d.safetensors/inside");
    REQUIRE(error_of([&] { save_safetensors(folder / "d.safetensors", {{"x", at::ones({2})}}); }).kind() == ErrorKind::io);
    int num_files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path())) num_files += entry.exists();
    REQUIRE(num_files == 2);
}

TEST_CASE("safetensors: a folder is one file, an index with its files, or disjoint files", "[store]") {
    test::Folder folder;
    auto save = [&](const std::string& name, const std::string& tensor) { save_safetensors(folder / name, {{tensor, at::full({2}, double(tensor[0]), at::kFloat)}}); };
    std::filesystem::create_directories(folder / "s");
    save("s/p.safetensors", "b");
    save("s/q.safetensors", "a");
    {
        SafetensorsFolder files(folder / "s");
        REQUIRE(files.names() == std::vector<std::string>{"a", "b"});
        REQUIRE(files.get("a")[0].item<float>() == 'a');
        REQUIRE(error_of([&] { files.get("c"); }).kind() == ErrorKind::data);
    }
    REQUIRE(SafetensorsFolder(folder / "s/p.safetensors").names() == std::vector<std::string>{"b"});
    auto index = [&](const std::string& map) {
        folder.write("s/model.safetensors.index.json", "{\"weight_map\":" + map + "}");
        return SafetensorsFolder(folder / "s").names();
    };
    REQUIRE(index(R"({"a":"q.safetensors"})") == std::vector<std::string>{"a"});
    REQUIRE(index(R"({"a":"q.safetensors","b":"p.safetensors"})").size() == 2);
    REQUIRE(error_of([&] { index(R"({"a":"p.safetensors"})"); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { index(R"({"a":"q.safetensors","c":"q.safetensors"})"); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { index(R"({"a":"../s/q.safetensors"})"); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { index(R"({"a":"missing.safetensors"})"); }).kind() == ErrorKind::io);
    REQUIRE(error_of([&] { index("3"); }).kind() == ErrorKind::data);
    std::filesystem::remove(folder / "s/model.safetensors.index.json");
    save("s/r.safetensors", "a");
    REQUIRE(error_of([&] { SafetensorsFolder(folder / "s"); }).kind() == ErrorKind::data);
    std::filesystem::create_directories(folder / "none");
    REQUIRE(error_of([&] { SafetensorsFolder(folder / "none"); }).kind() == ErrorKind::io);
    REQUIRE(error_of([&] { SafetensorsFolder(folder / "nowhere"); }).kind() == ErrorKind::io);
}
