#include "lua/bind/cuda_signature.h"

#include "core/base/error.h"

#include <algorithm>
#include <string_view>

namespace moe::lua {
namespace {
struct TypeWords {
    const char* words;
    at::ScalarType dtype;
    size_t bytes;
    bool is_unsigned = false, is_number = true;
};
// Types of a 64-bit Linux. Unsigned ones share the signed tensors' dtypes, which LibTorch has more of.
constexpr TypeWords kTypes[] = {
    {"float", at::kFloat, 4}, {"double", at::kDouble, 8}, {"bool", at::kBool, 1},
    {"char", at::kChar, 1}, {"signed char", at::kChar, 1}, {"int8_t", at::kChar, 1}, {"unsigned char", at::kByte, 1, true}, {"uint8_t", at::kByte, 1, true},
    {"short", at::kShort, 2}, {"int16_t", at::kShort, 2}, {"unsigned short", at::kShort, 2, true}, {"uint16_t", at::kShort, 2, true},
    {"int", at::kInt, 4}, {"int32_t", at::kInt, 4}, {"unsigned", at::kInt, 4, true}, {"unsigned int", at::kInt, 4, true}, {"uint32_t", at::kInt, 4, true},
    {"long", at::kLong, 8}, {"long long", at::kLong, 8}, {"long int", at::kLong, 8}, {"long long int", at::kLong, 8}, {"int64_t", at::kLong, 8}, {"unsigned long", at::kLong, 8, true},
    {"unsigned long long", at::kLong, 8, true}, {"uint64_t", at::kLong, 8, true}, {"size_t", at::kLong, 8, true},
    {"__half", at::kHalf, 2, false, false}, {"half", at::kHalf, 2, false, false}, {"__nv_bfloat16", at::kBFloat16, 2, false, false}, {"nv_bfloat16", at::kBFloat16, 2, false, false},
    {"__nv_fp8_e4m3", at::kFloat8_e4m3fn, 1, false, false}, {"__nv_fp8_e5m2", at::kFloat8_e5m2, 1, false, false},
};

bool is_word(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_'; }

/// Comments and the insides of quotes as spaces, so that places stay.
std::string without_comments(std::string s) {
    for (size_t i = 0; i < s.size(); ++i) {
        size_t end = i;
        if (s.compare(i, 2, "//") == 0) {
            end = s.find('\n', i);
        } else if (s.compare(i, 2, "/*") == 0) {
            end = s.find("*/", i + 2);
            end = end == std::string::npos ? end : end + 2;
        } else if (s[i] == '"' || s[i] == '\'') {
            size_t close = i + 1;
            while (close < s.size() && s[close] != s[i] && s[close] != '\n') close += s[close] == '\\' ? 2 : 1;
            i = close;
            continue;
        } else {
            continue;
        }
        end = std::min(end, s.size());
        for (size_t k = i; k < end; ++k) s[k] = s[k] == '\n' ? '\n' : ' ';
        i = end ? end - 1 : end;
    }
    return s;
}

/// Words and single signs.
std::vector<std::string> tokens_of(std::string_view text) {
    std::vector<std::string> out;
    for (size_t i = 0; i < text.size();) {
        if (isspace(static_cast<unsigned char>(text[i]))) {
            ++i;
            continue;
        }
        size_t end = i + 1;
        while (is_word(text[i]) && end < text.size() && is_word(text[end])) ++end;
        out.emplace_back(text.substr(i, end - i));
        i = end;
    }
    return out;
}

[[noreturn]] void unfit(const std::string& kernel, std::string_view text) {
    std::string shown;
    for (auto& token : tokens_of(text)) shown += (shown.empty() ? "" : " ") + token;
    MOE_THROW(usage, "moe.cuda.compile: parameter of " + kernel, shown, "a pointer to numbers, or a number (int, long long, float, double, bool …)", "half and bfloat16 come as pointers");
}

KernelParameter parameter_of(const std::string& kernel, std::string_view text) {
    KernelParameter p;
    std::string words;
    int stars = 0;
    bool read_only = false;
    std::vector<std::string> names;
    for (auto& token : tokens_of(text)) {
        if (token == "*" || token == "[") {
            ++stars;
        } else if (token == "const") {
            read_only = read_only || stars == 0;
        } else if (token == "=") {
            break;
        } else if (token == "__restrict__" || token == "__restrict" || token == "volatile" || token == "]" || token == "__grid_constant__" || isdigit(static_cast<unsigned char>(token[0]))) {
            continue;
        } else if (!is_word(token[0])) {
            unfit(kernel, text);
        } else {
            names.push_back(token);
        }
    }
    auto find = [&](const std::string& words) { return std::find_if(std::begin(kTypes), std::end(kTypes), [&](auto& t) { return words == t.words; }); };
    // All words but the last are the type, unless the parameter has no name.
    auto joined = [&](size_t n) {
        std::string all;
        for (size_t i = 0; i < n; ++i) all += (i ? " " : "") + names[i];
        return all;
    };
    words = joined(names.size());
    if (find(words) == std::end(kTypes) && words != "void" && names.size() > 1) {
        p.name = names.back();
        words = joined(names.size() - 1);
    }
    auto type = find(words);
    bool is_void = words == "void" && stars == 1;
    if (stars > 1 || (!is_void && type == std::end(kTypes)) || (stars == 0 && !type->is_number)) unfit(kernel, text);
    p.type = words + (stars ? "*" : "");
    p.is_pointer = stars == 1;
    p.is_read_only = p.is_pointer && read_only;
    if (!is_void) p.dtype = type->dtype, p.is_unsigned = type->is_unsigned;
    p.bytes = p.is_pointer ? 8 : type->bytes;
    return p;
}

/// Place after the sign that closes the one at `open`.
size_t after_closing(const std::string& s, size_t open) {
    int depth = 0;
    for (size_t i = open; i < s.size(); ++i) {
        depth += s[i] == '(' ? 1 : s[i] == ')' ? -1 : 0;
        if (depth == 0) return i + 1;
    }
    return std::string::npos;
}
}  // namespace

std::vector<KernelSignature> kernel_signatures(const std::string& source) {
    std::string s = without_comments(source);
    std::vector<KernelSignature> out;
    constexpr std::string_view kMark = "__global__";
    for (size_t at = s.find(kMark); at != std::string::npos; at = s.find(kMark, at + 1)) {
        size_t start = s.find_last_of(";}{", at);
        bool is_template = s.substr(start == std::string::npos ? 0 : start, at - (start == std::string::npos ? 0 : start)).find("template") != std::string::npos;
        std::string name;
        size_t i = at + kMark.size(), open = std::string::npos;
        while (i < s.size() && s[i] != ';' && s[i] != '{') {
            if (is_word(s[i])) {
                size_t end = i;
                while (end < s.size() && is_word(s[end])) ++end;
                name = s.substr(i, end - i);
                i = end;
            } else if (s[i] == '(') {
                if (name != "__launch_bounds__" && name != "__cluster_dims__" && name != "__maxnreg__") {
                    open = i;
                    break;
                }
                i = after_closing(s, i);
            } else {
                ++i;
            }
        }
        size_t end = open == std::string::npos ? open : after_closing(s, open);
        if (is_template || name.empty() || end == std::string::npos) continue;
        if (std::any_of(out.begin(), out.end(), [&](auto& k) { return k.name == name; })) continue;    // declared before
        KernelSignature kernel{name, {}};
        std::string_view list = std::string_view(s).substr(open + 1, end - open - 2);
        for (size_t from = 0; from <= list.size();) {
            size_t comma = std::min(list.find(',', from), list.size());
            std::string_view part = list.substr(from, comma - from);
            auto words = tokens_of(part);
            bool nothing = words.empty() || (words.size() == 1 && words[0] == "void");
            if (!nothing) kernel.parameters.push_back(parameter_of(name, part));
            from = comma + 1;
        }
        out.push_back(std::move(kernel));
    }
    return out;
}
}  // namespace moe::lua
