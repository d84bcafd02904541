#include "core/data/loader.h"

#include "core/base/error.h"
#include "core/base/random.h"
#include "core/data/mixture.h"
#include "core/data/prefetch.h"
#include "core/data/sources.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <deque>

namespace moe::data {
namespace {
using Json = nlohmann::json;
constexpr int64_t kNoTarget = -100;
// Calls whose sequences are prepared ahead, and how much of them.
constexpr int64_t kCallsAhead = 2, kMaxBytesAhead = int64_t(256) << 20;

/// A sequence that the mixture has laid out and that was not given yet.
struct Planned {
    std::vector<Piece> pieces;
    std::vector<Cursor> after;      ///< where the domains stand once it is given
    int64_t num_tokens = 0;
};

/// The same for rows of a Batch and for rows that a worker made.
struct RowView {
    int64_t *ids, *targets;
    int32_t *domain, *doc_start;
};

/// Turns pieces into a row. Holds nothing that changes, so that workers share it.
class RowMaker {
public:
    explicit RowMaker(const Mixture& mixture) : domains_(mixture.domains()), seq_length_(mixture.options().seq_length) {}

    void make(const std::vector<Piece>& pieces, Row& row) const {
        row.ids.resize(size_t(seq_length_));
        row.targets.resize(size_t(seq_length_));
        row.domain.resize(size_t(seq_length_));
        row.doc_start.resize(size_t(seq_length_));
        make(pieces, {row.ids.data(), row.targets.data(), row.domain.data(), row.doc_start.data()});
    }

    void make(const std::vector<Piece>& pieces, const RowView& row) const {
        static thread_local std::vector<int64_t> buffer;
        std::fill_n(row.targets, seq_length_, kNoTarget);
        int64_t used = 0;
        for (const auto& p : pieces) {
            buffer.resize(size_t(p.length + 1));   // one more for the last token's target
            int64_t got = domains_[size_t(p.domain)]->read(p.document, p.offset, buffer);
            MOE_CHECK(got >= p.length, internal, "loader.next", fmt::format("{} tokens of document {}", got, p.document), fmt::format("{}", p.length), "");
            std::copy_n(buffer.begin(), p.length, row.ids + p.position);
            std::copy_n(buffer.begin() + 1, got - 1, row.targets + p.position);
            std::fill_n(row.domain + p.position, p.length, p.domain);
            std::fill_n(row.doc_start + p.position, p.length, int32_t(p.position));
            used = p.position + p.length;
        }
        std::fill(row.ids + used, row.ids + seq_length_, 0);
        std::fill(row.domain + used, row.domain + seq_length_, -1);
        // Padding sees only padding.
        std::fill(row.doc_start + used, row.doc_start + seq_length_, int32_t(used));
    }

private:
    const std::vector<std::unique_ptr<Domain>>& domains_;
    int64_t seq_length_;
};

/// The mixture runs ahead of what was given: planned_ holds what lies between.
class MixtureLoader final : public Loader {
public:
    MixtureLoader(Mixture mixture, int64_t num_workers, std::string data_set)
        : mixture_(std::move(mixture)), maker_(mixture_), num_workers_(num_workers), data_set_(std::move(data_set)), given_(mixture_.cursors()) {
        for (const auto& d : mixture_.domains()) names_.push_back(d->name());
    }
    const std::vector<std::string>& domains() const override { return names_; }
    int64_t tokens_per_epoch() const override;
    int64_t num_bad_lines() const override;
    Batch next(int64_t num_sequences, int64_t first, int64_t count) override;
    int64_t sequences_for_tokens(int64_t tokens, int64_t multiple) override;
    Json state() const override;
    void restore(const Json& state) override;

private:
    const Planned& planned(int64_t i);
    void fill(Batch& batch, int64_t first, int64_t count);
    void look_ahead(int64_t num_sequences, int64_t first, int64_t count);
    std::string identity() const;

    Mixture mixture_;
    RowMaker maker_;
    int64_t num_workers_;
    std::string data_set_;
    std::vector<std::string> names_;
    std::deque<Planned> planned_;               ///< from next_sequence_ on
    std::vector<Cursor> given_;                 ///< where the domains stand at next_sequence_
    int64_t next_sequence_ = 0;
    std::unique_ptr<Prefetcher> prefetcher_;    ///< from the first next() on; the last member: its threads use the others
};

int64_t MixtureLoader::tokens_per_epoch() const {
    int64_t sum = 0;
    for (const auto& d : mixture_.domains()) {
        if (d->num_tokens() < 0) return -1;
        sum += d->num_tokens();
    }
    return sum;
}

int64_t MixtureLoader::num_bad_lines() const {
    int64_t sum = 0;
    for (const auto& d : mixture_.domains()) sum += d->num_bad_lines();
    return sum;
}

/// Sequence next_sequence_ + i.
const Planned& MixtureLoader::planned(int64_t i) {
    while (int64_t(planned_.size()) <= i) {
        Planned p{mixture_.next_sequence(), mixture_.cursors(), 0};
        for (const Piece& piece : p.pieces) p.num_tokens += piece.length;
        planned_.push_back(std::move(p));
    }
    return planned_[size_t(i)];
}

Batch MixtureLoader::next(int64_t num_sequences, int64_t first, int64_t count) {
    MOE_CHECK(first >= 0 && count >= 0 && first + count <= num_sequences, shape, "loader.next", fmt::format("part [{}, {}) of {} sequences", first, first + count, num_sequences),
              "a part inside of them", "");
    int64_t seq_length = mixture_.options().seq_length;
    Batch batch;
    batch.ids = at::empty({count, seq_length}, at::kLong);
    batch.targets = at::empty({count, seq_length}, at::kLong);
    batch.domain = at::empty({count, seq_length}, at::kInt);
    batch.doc_start = at::empty({count, seq_length}, at::kInt);
    batch.first_sequence = next_sequence_ + first;
    if (num_sequences == 0) return batch;
    std::vector<Cursor> after = planned(num_sequences - 1).after;
    // A failed read must not lose sequences: the position moves on only when all of them are there.
    fill(batch, first, count);
    given_ = std::move(after);
    planned_.erase(planned_.begin(), planned_.begin() + num_sequences);
    next_sequence_ += num_sequences;
    if (prefetcher_) look_ahead(num_sequences, first, count);
    return batch;
}

void MixtureLoader::fill(Batch& batch, int64_t first, int64_t count) {
    int64_t seq_length = mixture_.options().seq_length;
    RowView rows{batch.ids.data_ptr<int64_t>(), batch.targets.data_ptr<int64_t>(), batch.domain.data_ptr<int32_t>(), batch.doc_start.data_ptr<int32_t>()};
    auto row = [&](int64_t i) { return RowView{rows.ids + i * seq_length, rows.targets + i * seq_length, rows.domain + i * seq_length, rows.doc_start + i * seq_length}; };
    if (num_workers_ == 0) {
        for (int64_t i = 0; i < count; ++i) maker_.make(planned(first + i).pieces, row(i));
        return;
    }
    if (!prefetcher_) prefetcher_ = std::make_unique<Prefetcher>(num_workers_, [this](const std::vector<Piece>& pieces, Row& made) { maker_.make(pieces, made); });
    try {
        for (int64_t i = 0; i < count; ++i) prefetcher_->request(next_sequence_ + first + i, planned(first + i).pieces);
        for (int64_t i = 0; i < count; ++i) {
            Row made = prefetcher_->take(next_sequence_ + first + i);
            RowView to = row(i);
            std::copy(made.ids.begin(), made.ids.end(), to.ids);
            std::copy(made.targets.begin(), made.targets.end(), to.targets);
            std::copy(made.domain.begin(), made.domain.end(), to.domain);
            std::copy(made.doc_start.begin(), made.doc_start.end(), to.doc_start);
        }
    } catch (...) {
        prefetcher_->clear();   // what was taken has to be made again
        throw;
    }
}

/// Has prepared what the next calls want if they want as much as this one; where they do not, the rest is prepared when it is asked for.
void MixtureLoader::look_ahead(int64_t num_sequences, int64_t first, int64_t count) {
    prefetcher_->drop_below(next_sequence_);
    int64_t room = std::max<int64_t>(1, kMaxBytesAhead / (mixture_.options().seq_length * int64_t(2 * sizeof(int64_t) + 2 * sizeof(int32_t))));
    for (int64_t call = 0; call < kCallsAhead; ++call) {
        for (int64_t i = 0; i < count && room > 0; ++i, --room) {
            int64_t index = call * num_sequences + first + i;
            prefetcher_->request(next_sequence_ + index, planned(index).pieces);
        }
    }
}

int64_t MixtureLoader::sequences_for_tokens(int64_t tokens, int64_t multiple) {
    MOE_CHECK(tokens >= 0 && multiple >= 1, usage, "loader.sequences_for_tokens", fmt::format("{} tokens, a multiple of {}", tokens, multiple), "at least 0 tokens and a multiple of at least 1", "");
    int64_t count = 0, have = 0;
    do {
        for (int64_t i = 0; i < multiple; ++i) have += planned(count++).num_tokens;
    } while (have < tokens);
    return count;
}

// Everything that the meaning of a position depends on. Weights may change on resume: the shares then follow the new ones.
std::string MixtureLoader::identity() const {
    const auto& o = mixture_.options();
    std::string text = fmt::format("{} {} {} {} {}", o.seq_length, o.packing, o.shuffle, o.shuffle_seed, data_set_);
    for (const auto& d : mixture_.domains()) text += fmt::format(" {}:{:x}", d->name(), d->fingerprint());
    return fmt::format("{:016x}", hash_name(text));
}

Json MixtureLoader::state() const {
    Json cursors = Json::array();
    for (size_t d = 0; d < names_.size(); ++d) cursors.push_back({{"name", names_[d]}, {"chunk", given_[d].chunk}, {"offset", given_[d].offset}, {"tokens", given_[d].tokens}});
    return {{"version", 1}, {"identity", identity()}, {"next_sequence", next_sequence_}, {"domains", cursors}};
}

void MixtureLoader::restore(const Json& state) {
    try {
        MOE_CHECK(state.at("version") == 1 && state.at("identity") == identity(), state, "data", fmt::format("a position of other data ({})", state.at("identity").dump()),
                  fmt::format("one of this run's data (\"{}\")", identity()),
                  "the sources, data.dataset_name or dataset_version, training.seq_length, data.packing or the shuffle changed since it was saved");
        std::vector<Cursor> cursors;
        for (const auto& c : state.at("domains")) cursors.push_back({c.at("chunk"), c.at("offset"), c.at("tokens")});
        MOE_CHECK(cursors.size() == names_.size(), state, "data", fmt::format("{} domains", cursors.size()), fmt::format("{}", names_.size()), "");
        next_sequence_ = state.at("next_sequence");
        given_ = cursors;
        mixture_.set_cursors(std::move(cursors));
        planned_.clear();
        if (prefetcher_) prefetcher_->clear();
    } catch (const Json::exception& e) {
        MOE_THROW(state, "data", fmt::format("a data position that cannot be read: {}", e.what()), "what state() gave", "the checkpoint is damaged");
    }
}
}  // namespace

int64_t Batch::num_valid() const { return targets.ne(kNoTarget).sum().item<int64_t>(); }

std::unique_ptr<Loader> open_loader(const Config& config, bool validation) {
    const auto& data = config.data;
    MOE_CHECK(config.training.seq_length >= 1, config, "training.seq_length", fmt::format("{}", config.training.seq_length), "at least 1", "");
    MOE_CHECK(data.preprocessing.num_workers >= 0, config, "data.preprocessing.num_workers", fmt::format("{}", data.preprocessing.num_workers), "at least 0", "0 reads in the calling thread");
    MOE_CHECK(data.fim_rate == 0, config, "data.fim_rate", fmt::format("{}", data.fim_rate), "0", "fill-in-the-middle is not built in this version");
    Sources sources = open_sources(config, validation);
    MixtureOptions options{config.training.seq_length, data.packing, data.preprocessing.shuffle && !validation, uint64_t(data.preprocessing.shuffle_seed)};
    return std::make_unique<MixtureLoader>(Mixture(std::move(sources.domains), std::move(sources.weights), options), data.preprocessing.num_workers,
                                           fmt::format("{} {}", data.dataset_name.value_or(""), data.dataset_version.value_or("")));
}

}  // namespace moe::data
