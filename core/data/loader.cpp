#include "core/data/loader.h"

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/base/random.h"
#include "core/data/mixture.h"
#include "core/data/synthetic_domain.h"
#include "core/data/text_domain.h"
#include "core/data/tokenizer.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <set>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
using Json = nlohmann::json;
constexpr int64_t kNoTarget = -100;
// Validation takes documents of the same synthetic process that training does not reach.
constexpr int64_t kHeldOutDocument = int64_t(1) << 31;

class MixtureLoader final : public Loader {
public:
    MixtureLoader(Mixture mixture, bool document_mask) : mixture_(std::move(mixture)), document_mask_(document_mask) {
        for (const auto& d : mixture_.domains()) names_.push_back(d->name());
    }
    const std::vector<std::string>& domains() const override { return names_; }
    int64_t tokens_per_epoch() const override;
    Batch next(int64_t num_sequences, int64_t first, int64_t count) override;
    int64_t sequences_for_tokens(int64_t tokens, int64_t multiple) override;
    Json state() const override;
    void restore(const Json& state) override;

private:
    void fill_row(const std::vector<Piece>& pieces, Batch& batch, int64_t row);
    std::string identity() const;

    Mixture mixture_;
    bool document_mask_;
    int64_t next_sequence_ = 0;
    std::vector<std::string> names_;
    std::vector<int64_t> buffer_;
};

int64_t MixtureLoader::tokens_per_epoch() const {
    int64_t sum = 0;
    for (const auto& d : mixture_.domains()) {
        if (d->num_tokens() < 0) return -1;
        sum += d->num_tokens();
    }
    return sum;
}

Batch MixtureLoader::next(int64_t num_sequences, int64_t first, int64_t count) {
    MOE_CHECK(first >= 0 && count >= 0 && first + count <= num_sequences, shape, "loader.next", fmt::format("part [{}, {}) of {} sequences", first, first + count, num_sequences),
              "a part inside of them", "");
    int64_t seq_length = mixture_.options().seq_length;
    Batch batch;
    batch.ids = at::zeros({count, seq_length}, at::kLong);
    batch.targets = at::full({count, seq_length}, kNoTarget, at::kLong);
    batch.domain = at::full({count, seq_length}, -1, at::kInt);
    batch.doc_start = at::zeros({count, seq_length}, at::kInt);
    batch.first_sequence = next_sequence_ + first;
    // A failed read must not lose sequences: the position moves on only when all of them are there.
    auto before = mixture_.cursors();
    try {
        for (int64_t i = 0; i < num_sequences; ++i) {
            auto pieces = mixture_.next_sequence();
            if (i >= first && i < first + count) fill_row(pieces, batch, i - first);
        }
    } catch (...) {
        mixture_.set_cursors(std::move(before));
        throw;
    }
    next_sequence_ += num_sequences;
    return batch;
}

int64_t MixtureLoader::sequences_for_tokens(int64_t tokens, int64_t multiple) {
    MOE_CHECK(tokens >= 1 && multiple >= 1, shape, "loader.sequences_for_tokens", fmt::format("{} tokens, a multiple of {}", tokens, multiple), "at least 1 of each", "");
    auto before = mixture_.cursors();
    int64_t sequences = 0, held = 0;
    for (; held < tokens || sequences % multiple; ++sequences)
        for (const auto& p : mixture_.next_sequence()) held += p.length;
    mixture_.set_cursors(std::move(before));
    return sequences;
}

void MixtureLoader::fill_row(const std::vector<Piece>& pieces, Batch& batch, int64_t row) {
    int64_t seq_length = mixture_.options().seq_length, used = 0;
    int64_t* ids = batch.ids.data_ptr<int64_t>() + row * seq_length;
    int64_t* targets = batch.targets.data_ptr<int64_t>() + row * seq_length;
    int32_t* domain = batch.domain.data_ptr<int32_t>() + row * seq_length;
    int32_t* doc_start = batch.doc_start.data_ptr<int32_t>() + row * seq_length;
    for (const auto& p : pieces) {
        buffer_.resize(size_t(p.length + 1));   // one more for the last token's target
        int64_t got = mixture_.domains()[size_t(p.domain)]->read(p.document, p.offset, buffer_);
        MOE_CHECK(got >= p.length, internal, "loader.next", fmt::format("{} tokens of document {}", got, p.document), fmt::format("{}", p.length), "");
        std::copy_n(buffer_.begin(), p.length, ids + p.position);
        std::copy_n(buffer_.begin() + 1, got - 1, targets + p.position);
        std::fill_n(domain + p.position, p.length, p.domain);
        if (document_mask_) std::fill_n(doc_start + p.position, p.length, int32_t(p.position));
        used = p.position + p.length;
    }
    // Padding sees only padding.
    if (document_mask_) std::fill(doc_start + used, doc_start + seq_length, int32_t(used));
}

// Everything that the meaning of a position depends on. Weights may change on resume: the shares then follow the new ones.
std::string MixtureLoader::identity() const {
    const auto& o = mixture_.options();
    std::string text = fmt::format("{} {} {} {}", o.seq_length, o.packing, o.shuffle, o.shuffle_seed);
    for (const auto& d : mixture_.domains()) text += fmt::format(" {}:{:x}", d->name(), d->fingerprint());
    return fmt::format("{:016x}", hash_name(text));
}

Json MixtureLoader::state() const {
    Json cursors = Json::array();
    for (size_t d = 0; d < names_.size(); ++d) {
        const auto& c = mixture_.cursors()[d];
        cursors.push_back({{"name", names_[d]}, {"chunk", c.chunk}, {"offset", c.offset}, {"tokens", c.tokens}});
    }
    return {{"version", 1}, {"identity", identity()}, {"next_sequence", next_sequence_}, {"domains", cursors}};
}

void MixtureLoader::restore(const Json& state) {
    try {
        MOE_CHECK(state.at("version") == 1 && state.at("identity") == identity(), state, "data", fmt::format("a position of other data ({})", state.at("identity").dump()),
                  fmt::format("one of this run's data (\"{}\")", identity()), "the sources, training.seq_length, data.packing or the shuffle changed since it was saved");
        std::vector<Cursor> cursors;
        for (const auto& c : state.at("domains")) cursors.push_back({c.at("chunk"), c.at("offset"), c.at("tokens")});
        MOE_CHECK(cursors.size() == names_.size(), state, "data", fmt::format("{} domains", cursors.size()), fmt::format("{}", names_.size()), "");
        int64_t next_sequence = state.at("next_sequence");
        mixture_.set_cursors(std::move(cursors));
        next_sequence_ = next_sequence;
    } catch (const Json::exception& e) {
        MOE_THROW(state, "data", fmt::format("a data position that cannot be read: {}", e.what()), "what state() gave", "the checkpoint is damaged");
    }
}

struct Source {
    std::string name, path;
    std::optional<double> weight;   ///< none: its tokens
};

// The folder's subfolders are its domains; without any, the folder or file is one domain.
std::vector<Source> sources_of_folder(const std::string& path, const std::string& key) {
    std::error_code code;
    std::vector<Source> sources;
    int64_t num_loose = 0;
    if (fs::is_directory(path, code)) {
        fs::directory_iterator it(path, code), end;
        for (; !code && it != end; it.increment(code)) {
            std::string name = it->path().filename().string();
            if (name.starts_with('.')) continue;
            if (it->is_directory()) sources.push_back({name, it->path().string(), {}});
            else ++num_loose;
        }
    }
    MOE_CHECK(!code, io, key, fmt::format("{}: {}", path, code.message()), "a readable file or folder of text", "check the path and its permissions");
    if (sources.empty()) return {{fs::path(path).lexically_normal().filename().string(), path, {}}};
    std::sort(sources.begin(), sources.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    if (num_loose > 0) log::warn(fmt::format("{}: {} files beside the domains' folders in {} are not read", key, num_loose, path));
    return sources;
}

std::vector<Source> text_sources(const std::vector<DataSource>& listed, const std::optional<std::string>& path, const std::string& section) {
    if (listed.empty()) {
        MOE_CHECK(path, config, section + ".path", "null", "a file or folder of text", fmt::format("or list {}.sources, or set data.dataset_type to \"synthetic\"", section));
        return sources_of_folder(*path, section + ".path");
    }
    MOE_CHECK(!path, config, section + ".path", fmt::format("\"{}\" and {} sources", *path, listed.size()), "one of the two", "move the path into a source of its own");
    std::vector<Source> sources;
    std::set<std::string> names;
    for (size_t i = 0; i < listed.size(); ++i) {
        std::string key = fmt::format("{}.sources[{}]", section, i);
        MOE_CHECK(listed[i].path, config, key + ".path", "null", "a file or folder of text", "");
        MOE_CHECK(!listed[i].name.empty() && names.insert(listed[i].name).second, config, key + ".name", fmt::format("\"{}\"", listed[i].name), "a name of its own", "it is the domain's name in every plot");
        sources.push_back({listed[i].name, *listed[i].path, listed[i].weight});
    }
    return sources;
}

bool names_files(const std::vector<DataSource>& sources, const std::optional<std::string>& path) {
    return path || std::any_of(sources.begin(), sources.end(), [](const auto& s) { return s.path.has_value(); });
}

struct Opened {
    std::vector<std::unique_ptr<Domain>> domains;
    std::vector<double> weights;
};

Opened open_synthetic(const Config& config, bool validation, int64_t vocab_size) {
    const auto& sources = validation ? config.validation.sources : config.data.sources;
    const auto& path = validation ? config.validation.path : config.data.path;
    MOE_CHECK(!names_files(sources, path), config, "data.dataset_type", fmt::format("\"synthetic\" with a path in {}", validation ? "validation" : "data"), "\"text\"",
              "synthetic data reads no files: change dataset_type or remove the path");
    MOE_CHECK(config.data.synthetic.domains >= 1, config, "data.synthetic.domains", fmt::format("{}", config.data.synthetic.domains), "at least 1", "");
    Opened opened;
    for (int64_t d = 0; d < config.data.synthetic.domains; ++d) {
        opened.domains.push_back(std::make_unique<SyntheticDomain>(d, vocab_size, uint64_t(config.data.synthetic.seed), validation ? kHeldOutDocument : 0));
        opened.weights.push_back(1);
    }
    return opened;
}

Opened open_text(const Config& config, bool validation) {
    std::string section = validation ? "validation" : "data";
    auto sources = validation ? text_sources(config.validation.sources, config.validation.path, section) : text_sources(config.data.sources, config.data.path, section);
    Opened opened;
    for (const auto& s : sources) {
        opened.domains.push_back(std::make_unique<TextDomain>(s.name, s.path, config.training.seq_length, section));
        opened.weights.push_back(s.weight.value_or(double(opened.domains.back()->num_tokens())));
    }
    return opened;
}
}  // namespace

int64_t Batch::num_valid() const { return targets.ne(kNoTarget).sum().item<int64_t>(); }

std::unique_ptr<Loader> open_loader(const Config& config, bool validation) {
    const auto& data = config.data;
    MOE_CHECK(config.training.seq_length >= 1, config, "training.seq_length", fmt::format("{}", config.training.seq_length), "at least 1", "");
    MOE_CHECK(data.fim_rate == 0, config, "data.fim_rate", fmt::format("{}", data.fim_rate), "0", "fill-in-the-middle is not built in this version");
    auto tokenizer = open_tokenizer(data.tokenizer);
    int64_t vocab_size = config.model.vocab_size.value_or(tokenizer->vocab_size());
    Opened opened;
    if (data.dataset_type == "synthetic") {
        opened = open_synthetic(config, validation, vocab_size);
    } else {
        MOE_CHECK(data.dataset_type == "text" || data.dataset_type == "local_corpus", config, "data.dataset_type", fmt::format("\"{}\"", data.dataset_type),
                  "\"synthetic\", \"text\" or \"local_corpus\"", "other types are not read in this version");
        MOE_CHECK(vocab_size >= tokenizer->vocab_size(), config, "model.vocab_size", fmt::format("{}", vocab_size),
                  fmt::format("at least {}, the vocabulary of tokenizer \"{}\"", tokenizer->vocab_size(), data.tokenizer), "null follows the tokenizer");
        opened = open_text(config, validation);
    }
    MixtureOptions options{config.training.seq_length, data.packing, data.preprocessing.shuffle && !validation, uint64_t(data.preprocessing.shuffle_seed)};
    return std::make_unique<MixtureLoader>(Mixture(std::move(opened.domains), std::move(opened.weights), options), data.document_mask);
}

}  // namespace moe::data
