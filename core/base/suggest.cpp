#include "core/base/suggest.h"

#include <algorithm>
#include <cctype>

namespace moe {
int edit_distance(std::string_view a, std::string_view b) {
    auto same = [](char x, char y) { return std::tolower(static_cast<unsigned char>(x)) == std::tolower(static_cast<unsigned char>(y)); };
    std::vector<int> before, last(b.size() + 1), now(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) last[j] = int(j);
    for (size_t i = 1; i <= a.size(); ++i) {
        now[0] = int(i);
        for (size_t j = 1; j <= b.size(); ++j) {
            now[j] = std::min({last[j] + 1, now[j - 1] + 1, last[j - 1] + (same(a[i - 1], b[j - 1]) ? 0 : 1)});
            bool swapped = i > 1 && j > 1 && same(a[i - 1], b[j - 2]) && same(a[i - 2], b[j - 1]);
            if (swapped) now[j] = std::min(now[j], before[j - 2] + 1);
        }
        before = last;
        last = now;
    }
    return last[b.size()];
}

constexpr size_t kLongestWord = 200;

std::string nearest(std::string_view word, const std::vector<std::string>& candidates) {
    const std::string* best = nullptr;
    int best_distance = 0;
    if (word.size() > kLongestWord) return {};              // no misspelt name, and each comparison would cost its length
    for (const std::string& candidate : candidates) {
        int d = edit_distance(word, candidate);
        // A word that is part of a name ("experts" in "num_experts") is nearer than its missing letters say.
        bool part = word.size() >= 4 && (candidate.find(word) != std::string::npos || (candidate.size() >= 4 && word.find(candidate) != std::string_view::npos));
        if (part) d = std::min(d, 2);
        if (!part && d > int(std::max(word.size(), candidate.size()) + 1) / 3) continue;
        if (!best || d < best_distance) best = &candidate, best_distance = d;
    }
    return best ? *best : std::string();
}

std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates) {
    std::string name = nearest(word, candidates);
    return name.empty() ? name : "did you mean \"" + name + "\"?";
}
}  // namespace moe
