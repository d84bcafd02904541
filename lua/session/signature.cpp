#include "lua/session/signature.h"

#include "lua/session/lexer.h"

#include <cctype>

namespace moe::lua {
namespace {
/// Where the signature at the beginning of a help text ends: at the first ": " outside of brackets and quotes.
size_t signature_end(std::string_view line) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < line.size(); ++i) {
        char c = line[i];
        if (c == '"') quoted = !quoted;
        else if (!quoted && (c == '(' || c == '{')) ++depth;
        else if (!quoted && (c == ')' || c == '}')) --depth;
        else if (c == ':' && depth == 0 && !quoted && line.substr(i, 2) == ": ") return i;
    }
    return line.size();
}
}  // namespace

std::string note_of(const std::string& help) {
    std::string line = help.substr(0, help.find('\n'));
    size_t end = line.find(". ", signature_end(line));
    return end == std::string::npos ? line : line.substr(0, end + 1);
}

std::vector<std::string> option_names(const std::string& help, int argument, bool& is_changes) {
    std::vector<std::string> names;
    std::string line = help.substr(0, help.find('\n'));
    line.resize(signature_end(line));
    int depth = 0, at = 0;
    bool call = line.find('(') < line.find('{');
    std::string word;
    for (size_t i = 0; i < line.size(); ++i) {
        char c = line[i];
        if (c == '(' || c == '{') ++depth;
        if (c == ')' || c == '}') --depth;
        if (c == ',' && depth == 1 && call) ++at;
        bool here = depth > (call ? 1 : 0) && (!call || at == argument);
        if (here && line.compare(i, 9, "{changes}") == 0) is_changes = true;
        if (std::isalnum(static_cast<unsigned char>(c)) || c == '_') {
            word += c;
        } else if (c != ' ' || (i + 1 < line.size() && line[i + 1] != '=')) {
            if (c == '=' && here && is_identifier(word)) names.push_back(word);
            word.clear();
        }
    }
    return names;
}

std::vector<std::string> quoted_words(const std::string& help) {
    std::vector<std::string> words;
    for (size_t at = help.find('"'); at != std::string::npos;) {
        size_t end = help.find('"', at + 1);
        if (end == std::string::npos) break;
        std::string word = help.substr(at + 1, end - at - 1);
        if (word.find_first_of(" \n") == std::string::npos && !word.empty()) words.push_back(word);
        at = help.find('"', end + 1);
    }
    return words;
}

}  // namespace moe::lua
