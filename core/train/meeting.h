// Where ranks find each other between collectives: each says at which place of the program it is, and whether something went wrong there. Unlike
// a collective, a meeting of ranks that are at different places ends, and who waits for the others sleeps.
#pragma once
#include "core/base/error.h"
#include "core/dist/group.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moe::train {

/// What a rank says.
struct Word {
    std::string place;                      ///< "run:train(5) at x.lua:12"
    std::string value = {};                 ///< bytes for the others
    std::optional<ErrorParts> error = {};
    uint64_t digest = 0;                    ///< of what the place shortens: the same on all that are at one place
};

/// One thread a rank uses it.
class Meeting {
public:
    /// Over a group that nobody else uses.
    explicit Meeting(dist::Group group) : group_(std::move(group)) {}
    /// Of this process in the group, how many there are, and the group itself, for collectives of the thread that meets.
    int rank() const { return group_.rank(); }
    int size() const { return group_.size(); }
    const dist::Group& group() const { return group_; }
    /// The words of all ranks in their order, once all have come. Nothing where some have not after `limit_secs` (0: no limit). What these say later is
    /// then no answer any more: further meetings throw moe::Error (dist) at once.
    std::optional<std::vector<Word>> hear(const Word& mine, double limit_secs = 0);
    /// True once some did not come in time.
    bool is_broken() const { return is_broken_; }

private:
    bool send(const std::string& bytes, const std::vector<int>& to, double until_secs);
    std::optional<std::string> receive(int from, double until_secs);
    dist::Group group_;
    bool is_broken_ = false;
    std::unique_ptr<std::vector<char>> sent_;      ///< as long as it may still be on its way
};

/// Throws on all ranks, where any rank brings an error, the first one's (with its rank, unless all bring one); else, where the places differ,
/// moe::Error (dist) with the place of each; where only the digests differ, with the ranks of each.
void judge(const std::vector<Word>& words);

}  // namespace moe::train
