#include "core/train/run_folder.h"

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/version.h"
#include "core/config/load.h"
#include "core/train/agree.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>

namespace moe::train {
namespace fs = std::filesystem;
namespace {
constexpr const char* kHint = "choose another output_dir, check its permissions and the free space";

void write_file(const fs::path& path, const std::string& text) {
    std::ofstream out(path, std::ios::binary);
    out << text;
    out.close();
    MOE_CHECK(out.good(), io, "run folder", fmt::format("{} could not be written: {}", path.string(), std::strerror(errno)), "a folder that can be written", kHint);
}

std::string environment_json(const Environment& e) {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    nlohmann::ordered_json j = {{"moelab", kVersion}, {"commit", kCommit}, {"libtorch", kTorchVersion}, {"compiler", __VERSION__}, {"device", e.device}, {"host", host},
                                {"threads", at::get_num_threads()}, {"ranks", e.ranks}, {"command", e.command}, {"script", e.script}, {"started", std::time(nullptr)}};
    return j.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

/// The new folder, or throws.
fs::path create(const Config& config, const std::string& name) {
    fs::path parent = fs::path(config.output_dir) / name;
    std::error_code error;
    fs::create_directories(parent, error);
    MOE_CHECK(!error, io, "output_dir", fmt::format("{}: {}", parent.string(), error.message()), "a folder that can be made", kHint);
    for (std::time_t now = std::time(nullptr);; ++now) {
        fs::path folder = parent / std::to_string(now);
        if (fs::create_directory(folder, error)) return folder;     // false without an error: it was there, another run's
        MOE_CHECK(!error, io, "output_dir", fmt::format("{}: {}", folder.string(), error.message()), "a folder that can be made", kHint);
    }
}

std::string config_text(const Config& config) { return to_json(config).dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n"; }

fs::path fill(const Config& config, const std::string& name, const Environment& e) {
    fs::path folder = create(config, name);
    write_file(folder / "config.json", config_text(config));
    write_file(folder / "env.json", environment_json(e));
    if (!e.script.empty()) {
        std::error_code error;
        fs::copy_file(e.script, folder / "script.lua", error);
        MOE_CHECK(!error, io, "run folder: script.lua", fmt::format("{}: {}", e.script, error.message()), "a copy of the script", kHint);
    }
    std::error_code error;
    fs::create_directory(folder / "metrics", error);
    MOE_CHECK(!error, io, "run folder", fmt::format("{}: {}", (folder / "metrics").string(), error.message()), "a folder that can be made", kHint);
    return folder;
}
}  // namespace

std::string make_run_folder(const Config& config, const std::string& name, const Environment& environment, const dist::Group& world) {
    std::string folder;
    on_rank_0(world, [&] { folder = fill(config, name, environment).string(); });
    return shared_text(folder, world);
}

void reopen_run_folder(const Config& config, const fs::path& folder, const Environment& environment, int64_t attempt) {
    // What the earlier attempts ran with stays beside it.
    std::string text = config_text(config);
    if (std::string old = read_text((folder / "config.json").string()); old != text) {
        write_text((folder / fmt::format("config.before_attempt_{}.json", attempt)).string(), old);
        write_text((folder / "config.json").string(), text);
    }
    write_text((folder / fmt::format("env.attempt_{}.json", attempt)).string(), environment_json(environment));
    std::error_code error;
    fs::remove(folder / "stop", error);                 // it ended the attempt before
}

void append_event(const std::string& folder, const std::string& line) {
    std::ofstream out(fs::path(folder) / "events.jsonl", std::ios::binary | std::ios::app);
    out << line + "\n" << std::flush;
    MOE_CHECK(out.good(), io, "events.jsonl", fmt::format("{}: {}", folder, std::strerror(errno)), "a folder that can be written", kHint);
}

}  // namespace moe::train
