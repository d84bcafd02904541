#include "core/data/sources.h"

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/data/files.h"
#include "core/data/jsonl_shard.h"
#include "core/data/synthetic_domain.h"
#include "core/data/text_domain.h"
#include "core/data/token_shard.h"
#include "core/data/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <set>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
// Validation takes documents of the same synthetic process that training does not reach.
constexpr int64_t kHeldOutDocument = int64_t(1) << 31;

/// Where a domain's files are.
struct Place {
    std::string name, path;
    std::string key;                ///< configuration key that errors name
    std::optional<double> weight;   ///< none: its tokens
};

// The folder's subfolders are its domains; without any, the folder or file is one domain.
std::vector<Place> places_of_folder(const std::string& path, const std::string& key) {
    std::error_code code;
    std::vector<Place> places;
    int64_t num_loose = 0;
    if (fs::is_directory(path, code)) {
        fs::directory_iterator it(path, code), end;
        for (; !code && it != end; it.increment(code)) {
            std::string name = it->path().filename().string();
            if (name.starts_with('.')) continue;
            if (it->is_directory(code)) places.push_back({name, it->path().string(), key, {}});
            else ++num_loose;
        }
    }
    MOE_CHECK(!code, io, key, fmt::format("{}: {}", path, code.message()), "a readable file or folder of data", "check the path and its permissions");
    if (places.empty()) {
        fs::path last = fs::path(path).lexically_normal();
        if (!last.has_filename()) last = last.parent_path();        // a "/" at the end names the same folder
        return {{last.filename().string(), path, key, {}}};
    }
    std::sort(places.begin(), places.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    if (num_loose > 0) log::warn(fmt::format("{}: {} files beside the domains' folders in {} are not read", key, num_loose, path));
    return places;
}

// Of listed sources, those without a path lie below the section's path or, where there is none, below the cache.
std::vector<Place> listed_places(const std::vector<DataSource>& listed, const std::optional<std::string>& path, const std::string& cache_dir, const std::string& section) {
    bool all_have_paths = std::all_of(listed.begin(), listed.end(), [](const auto& s) { return s.path.has_value(); });
    MOE_CHECK(!path || !all_have_paths, config, section + ".path", fmt::format("\"{}\" and {} sources with paths", path.value_or(""), listed.size()), "one of the two",
              "move the path into a source of its own");
    std::vector<Place> places;
    std::set<std::string> names;
    for (size_t i = 0; i < listed.size(); ++i) {
        const DataSource& s = listed[i];
        std::string key = fmt::format("{}.sources[{}]", section, i);
        MOE_CHECK(!s.name.empty() && names.insert(s.name).second, config, key + ".name", fmt::format("\"{}\"", s.name), "a name of its own", "it is the domain's name in every plot");
        std::string below = (fs::path(path.value_or(cache_dir)) / s.subset.value_or(s.name)).string();
        places.push_back({s.name, s.path.value_or(below), key + ".path", s.weight});
    }
    return places;
}

std::vector<Place> places(const Config& config, bool validation) {
    std::string section = validation ? "validation" : "data";
    const auto& listed = validation ? config.validation.sources : config.data.sources;
    const auto& path = validation ? config.validation.path : config.data.path;
    if (!listed.empty()) return listed_places(listed, path, config.data.cache_dir, section);
    MOE_CHECK(path, config, section + ".path", "null", "a file or folder of data", fmt::format("or list {}.sources, or set data.dataset_type to \"synthetic\"", section));
    return places_of_folder(*path, section + ".path");
}

Sources open_synthetic(const Config& config, bool validation, int64_t vocab_size) {
    const auto& listed = validation ? config.validation.sources : config.data.sources;
    const auto& path = validation ? config.validation.path : config.data.path;
    bool names_files = path || std::any_of(listed.begin(), listed.end(), [](const auto& s) { return s.path.has_value(); });
    MOE_CHECK(!names_files, config, "data.dataset_type", fmt::format("\"synthetic\" with a path in {}", validation ? "validation" : "data"), "\"text\", \"jsonl\" or \"tokens\"",
              "synthetic data reads no files: change dataset_type or remove the path");
    MOE_CHECK(config.data.synthetic.domains >= 1, config, "data.synthetic.domains", fmt::format("{}", config.data.synthetic.domains), "at least 1", "");
    Sources opened;
    for (int64_t d = 0; d < config.data.synthetic.domains; ++d) {
        opened.domains.push_back(std::make_unique<SyntheticDomain>(d, vocab_size, uint64_t(config.data.synthetic.seed), validation ? kHeldOutDocument : 0));
        opened.weights.push_back(1);
    }
    return opened;
}

/// One domain of the files at a place that `is_ours` knows by name, each opened by `open`.
std::unique_ptr<Domain> open_shards(const Place& place, int64_t chunk_tokens, const std::string& kind, const std::function<bool(const std::string&)>& is_ours,
                                    const std::function<std::unique_ptr<Shard>(const std::string&)>& open) {
    std::vector<std::unique_ptr<Shard>> shards;
    auto files = list_files(place.path, place.key);
    for (const auto& [file, bytes] : files) {
        if (is_ours(file)) shards.push_back(open(file));
    }
    MOE_CHECK(!shards.empty(), data, place.key, fmt::format("{}: {} files, none of them {}", place.path, files.size(), kind), "at least one " + kind + " file",
              "data.dataset_type says what is read; names that begin with a dot are not");
    return std::make_unique<ShardDomain>(place.name, std::move(shards), chunk_tokens, place.key, place.path);
}

using OpenPlace = std::function<std::unique_ptr<Domain>(const Place&)>;

OpenPlace text_reader(const Config& config) {
    return [length = config.training.seq_length](const Place& p) { return std::make_unique<TextDomain>(p.name, p.path, length, p.key); };
}

OpenPlace jsonl_reader(const Config& config, std::shared_ptr<const Tokenizer> tokenizer) {
    const auto& d = config.data;
    MOE_CHECK(!d.text_field.empty(), config, "data.text_field", "\"\"", "the key of the text", "");
    JsonlOptions options{d.cache_dir, d.text_field, d.bad_lines == "skip", d.tokenizer, std::move(tokenizer)};
    return [options, length = config.training.seq_length](const Place& p) {
        return open_shards(p, length, ".jsonl", is_jsonl_file, [&](const std::string& file) { return open_jsonl_file(file, options, p.key); });
    };
}

OpenPlace token_reader(const Config& config, const Tokenizer& tokenizer, int64_t vocab_size) {
    TokenOptions options{config.data.cache_dir, tokenizer.end_of_document(), vocab_size};
    return [options, length = config.training.seq_length](const Place& p) {
        return open_shards(p, length, ".npy or .bin", is_token_file, [&](const std::string& file) { return open_token_file(file, options, p.key); });
    };
}
}  // namespace

Sources open_sources(const Config& config, bool validation) {
    const std::string& type = config.data.dataset_type;
    std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer(config.data.tokenizer);
    int64_t vocab_size = config.model.vocab_size.value_or(tokenizer->vocab_size());
    if (type == "synthetic") return open_synthetic(config, validation, vocab_size);
    OpenPlace open;
    if (type == "text" || type == "local_corpus") open = text_reader(config);
    if (type == "jsonl") open = jsonl_reader(config, tokenizer);
    if (type == "tokens") open = token_reader(config, *tokenizer, vocab_size);
    MOE_CHECK(open, config, "data.dataset_type", fmt::format("\"{}\"", type), "\"synthetic\", \"text\", \"jsonl\", \"tokens\" or \"local_corpus\"", "other types are not read in this version");
    // Shards are checked by the ids that are in them: their own tokenizer need not be there.
    MOE_CHECK(type == "tokens" || vocab_size >= tokenizer->vocab_size(), config, "model.vocab_size", fmt::format("{}", vocab_size),
              fmt::format("at least {}, the vocabulary of tokenizer \"{}\"", tokenizer->vocab_size(), config.data.tokenizer), "null follows the tokenizer");
    Sources opened;
    for (const Place& p : places(config, validation)) {
        opened.domains.push_back(open(p));
        opened.weights.push_back(p.weight.value_or(double(opened.domains.back()->num_tokens())));
    }
    return opened;
}

}  // namespace moe::data
