#include "core/train/meeting.h"

#include "core/train/agree.h"

#include <ATen/ATen.h>

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

namespace moe::train {
namespace {
constexpr double kYieldSecs = 0.0005, kSoonSecs = 0.5;
constexpr int kShortNap = 100, kLongNap = 3000;             // microseconds

double meeting_clock() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Until it is so; false where that took until `until` (0: no limit). Sleeps between looks: a rank that waits for a person must not take a core.
template <class F> bool wait_for(F&& is_so, double until) {
    for (double start = meeting_clock(); !is_so();) {
        double now = meeting_clock();
        if (until > 0 && now > until) return false;
        if (now - start < kYieldSecs) sched_yield();
        else std::this_thread::sleep_for(std::chrono::microseconds(now - start < kSoonSecs ? kShortNap : kLongNap));
    }
    return true;
}

void append(std::string& out, const std::string& part) {
    uint64_t size = part.size();
    out.append(reinterpret_cast<const char*>(&size), sizeof size).append(part);
}

std::string take(const std::string& bytes, size_t& at) {
    uint64_t size = 0;
    std::memcpy(&size, bytes.data() + at, sizeof size);
    at += sizeof size + size;
    return bytes.substr(at - size, size);
}

std::string packed_word(const Word& word) {
    std::string out;
    append(out, word.place);
    append(out, word.value);
    append(out, word.error ? packed_error(*word.error) : "");
    append(out, std::to_string(word.digest));
    return out;
}

Word unpacked_word(const std::string& bytes) {
    size_t at = 0;
    Word word{take(bytes, at), take(bytes, at)};
    if (std::string error = take(bytes, at); !error.empty()) word.error = unpacked_error(error);
    word.digest = std::stoull(take(bytes, at));
    return word;
}
}  // namespace

/// False where it has not left in time.
bool Meeting::send(const std::string& bytes, const std::vector<int>& to, double until) {
    uint64_t size = bytes.size();
    auto* first = reinterpret_cast<const char*>(&size);
    sent_ = std::make_unique<std::vector<char>>(first, first + sizeof size);
    sent_->insert(sent_->end(), bytes.begin(), bytes.end());
    auto part = [&](size_t begin, size_t count) { return at::from_blob(sent_->data() + begin, {int64_t(count)}, at::kByte); };
    for (int rank : to) {
        group_.send(part(0, sizeof size), rank);
        group_.send(part(sizeof size, size), rank);
    }
    bool left = wait_for([&] { return group_.is_flushed(); }, until);
    if (!left) (void)sent_.release();                    // the library may read it for ever
    return left;
}

std::optional<std::string> Meeting::receive(int from, double until) {
    if (!wait_for([&] { return group_.has_message(from); }, until)) return std::nullopt;
    uint64_t size = 0;
    group_.receive(at::from_blob(&size, {int64_t(sizeof size)}, at::kByte), from);
    std::string bytes(size, '\0');
    group_.receive(at::from_blob(bytes.data(), {int64_t(size)}, at::kByte), from);
    return bytes;
}

std::optional<std::vector<Word>> Meeting::hear(const Word& mine, double limit_secs) {
    MOE_CHECK(!is_broken_, dist, "the ranks have lost each other", "a rank that did not come in time to a call of all", "all ranks", "end the program; its first error says why");
    double until = limit_secs > 0 ? meeting_clock() + limit_secs : 0;
    std::string own = packed_word(mine);
    std::string all;
    is_broken_ = true;                                   // until this one has ended well
    if (rank() > 0) {
        if (!send(own, {0}, until)) return std::nullopt;
        auto got = receive(0, until);
        if (!got) return std::nullopt;
        all = *got;
    } else {
        append(all, own);
        std::vector<int> others;
        for (int r = 1; r < size(); ++r) {
            auto word = receive(r, until);
            if (!word) return std::nullopt;
            append(all, *word);
            others.push_back(r);
        }
        if (!send(all, others, until)) return std::nullopt;
    }
    is_broken_ = false;
    std::vector<Word> words;
    for (size_t at = 0; at < all.size();) words.push_back(unpacked_word(take(all, at)));
    return words;
}

void judge(const std::vector<Word>& words) {
    auto fails = [](const Word& w) { return w.error.has_value(); };
    auto first = std::find_if(words.begin(), words.end(), fails);
    if (first != words.end()) {
        ErrorParts parts = *first->error;
        if (parts.rank < 0 && !std::all_of(words.begin(), words.end(), fails)) parts.rank = int(first - words.begin());
        note_agreed(parts);
        throw Error(parts);
    }
    auto differs = [&](const Word& w) { return w.place != words[0].place || w.digest != words[0].digest; };
    auto other = std::find_if(words.begin(), words.end(), differs);
    if (other == words.end()) return;
    // Ranks at one place share a line.
    std::string got;
    for (size_t r = 0; r < words.size(); ++r) {
        auto same = [&](const Word& w) { return w.place == words[r].place && w.digest == words[r].digest; };
        if (std::find_if(words.begin(), words.begin() + long(r), same) != words.begin() + long(r)) continue;
        std::string ranks;
        for (size_t k = r; k < words.size(); ++k)
            if (same(words[k])) ranks += (ranks.empty() ? "" : ", ") + std::to_string(k);
        got += fmt::format("{}{} {}: {}", got.empty() ? "" : "; ", ranks.size() > 1 ? "ranks" : "rank", ranks, words[r].place);
    }
    bool same_places = std::all_of(words.begin(), words.end(), [&](const Word& w) { return w.place == words[0].place; });
    ErrorParts parts = {ErrorKind::dist, same_places ? "ranks with different arguments" : "ranks at different places", got, "the same call on all ranks", "what one rank does alone belongs into moe.on(rank, f)", "", int(other - words.begin()), ""};
    note_agreed(parts);
    throw Error(parts);
}

}  // namespace moe::train
