// Inputs of all sessions, in a file of one line each that several shells may append to at once.
#pragma once
#include <string>
#include <vector>

namespace moe::shell {

class History {
public:
    /// Reads the file, "" for none. More than `limit` entries, or half as many again with those that came twice, make it be written anew.
    explicit History(std::string path, size_t limit = 5000);
    /// Oldest first, each once: at its last place.
    const std::vector<std::string>& entries() const { return entries_; }
    /// Adds an input and appends it to the file; one that is empty or larger than 64 KiB is not kept.
    void add(const std::string& input);
    /// Why inputs do not outlive this session; "" while they do.
    const std::string& problem() const { return problem_; }
    /// $MOELAB_HISTORY, or moelab/history in $XDG_STATE_HOME or ~/.local/state; "" without a home.
    static std::string default_path();

private:
    void load();
    std::string path_, problem_;
    size_t limit_;
    std::vector<std::string> entries_;
};

}  // namespace moe::shell
