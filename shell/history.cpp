#include "shell/history.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <unordered_set>

namespace moe::shell {
namespace {
constexpr size_t kMostBytes = 64 << 10;

std::string escaped(const std::string& text) {
    std::string out;
    for (char c : text) {
        if (c == '\\') out += "\\\\";
        else if (c == '\n') out += "\\n";
        else out += c;
    }
    return out + '\n';
}

std::string unescaped(std::string_view line) {
    std::string out;
    for (size_t i = 0; i < line.size(); ++i) {
        if (line[i] != '\\' || i + 1 == line.size()) out += line[i];
        else out += line[++i] == 'n' ? '\n' : line[i];
    }
    return out;
}

/// An open file under a lock that other shells wait for.
class LockedFile {
public:
    explicit LockedFile(const std::string& path) : file_(open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) {
        if (file_ >= 0) flock(file_, LOCK_EX);
    }
    ~LockedFile() { if (file_ >= 0) close(file_); }
    LockedFile(const LockedFile&) = delete;
    bool is_open() const { return file_ >= 0; }
    std::string read_all() {
        std::string text;
        char block[1 << 14];
        lseek(file_, 0, SEEK_SET);
        for (ssize_t n; (n = read(file_, block, sizeof block)) > 0;) text.append(block, size_t(n));
        return text;
    }
    bool append(std::string_view text) { return write(file_, text.data(), text.size()) == ssize_t(text.size()); }
    bool clear() { return ftruncate(file_, 0) == 0; }

private:
    int file_;
};
}  // namespace

std::string History::default_path() {
    if (const char* path = std::getenv("MOELAB_HISTORY")) return path;
    const char *state = std::getenv("XDG_STATE_HOME"), *home = std::getenv("HOME");
    if (state && *state) return std::string(state) + "/moelab/history";
    return home && *home ? std::string(home) + "/.local/state/moelab/history" : "";
}

History::History(std::string path, size_t limit) : path_(std::move(path)), limit_(limit) {
    if (!path_.empty()) load();
}

void History::load() {
    std::error_code e;
    std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), e);
    LockedFile file(path_);
    if (!file.is_open()) {
        problem_ = path_ + ": " + std::strerror(errno);
        path_.clear();
        return;
    }
    std::string text = file.read_all();
    size_t lines = 0;
    for (size_t at = 0; at < text.size(); ++lines) {
        size_t end = std::min(text.find('\n', at), text.size());
        if (end > at) entries_.push_back(unescaped(std::string_view(text).substr(at, end - at)));
        at = end + 1;
    }
    std::unordered_set<std::string> seen;
    std::reverse(entries_.begin(), entries_.end());
    std::erase_if(entries_, [&](auto& entry) { return !seen.insert(entry).second; });
    if (entries_.size() > limit_) entries_.resize(limit_);
    std::reverse(entries_.begin(), entries_.end());
    if (lines <= limit_ + limit_ / 2) return;
    std::string all;
    for (auto& entry : entries_) all += escaped(entry);
    if (file.clear()) file.append(all);
}

void History::add(const std::string& input) {
    if (input.find_first_not_of(" \t\n") == std::string::npos || input.size() > kMostBytes) return;
    if (!entries_.empty() && entries_.back() == input) return;
    std::erase(entries_, input);
    entries_.push_back(input);
    if (path_.empty()) return;
    LockedFile file(path_);
    if (file.is_open() && file.append(escaped(input))) return;
    problem_ = path_ + ": " + std::strerror(errno);
    path_.clear();
}
}  // namespace moe::shell
