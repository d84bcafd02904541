// moelab: the interactive prompt, Lua files and commands.
#include "core/base/log.h"
#include "core/base/stop.h"
#include "core/base/suggest.h"
#include "core/base/version.h"
#include "lua/session/session.h"
#include "shell/launch.h"
#include "shell/repl.h"
#include "shell/terminal.h"

#include <ATen/Parallel.h>
#include <CLI/CLI.hpp>

#include <unistd.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <regex>

namespace moe::shell {
namespace {
std::atomic<lua::Session*> running_session = nullptr;
std::atomic<int> num_interrupts = 0;
constexpr int kInterruptedCode = 130;

/// The first interrupt ends what runs, the second the program: for code that does not come back to Lua.
void on_interrupt(int) {
    lua::Session* session = running_session;
    if (!session || ++num_interrupts > 1) _exit(130);
    session->interrupt();
}

/// What schedulers send before they take a machine away: training saves and ends at its step's edge. Where nothing trains, and the
/// second time, it is an interrupt.
void on_stop(int) {
    if (stop_requested() || !StopListener::any()) return on_interrupt(SIGINT);
    request_stop();
}

struct CommandLine {
    std::string code, file, device;
    std::vector<std::string> words;      ///< arguments of the file or command
    std::vector<std::pair<std::string, std::string>> given;    ///< the command's own options by name
    int ranks = 1, threads = 0;
    bool json = false, version = false, no_colour = false;
    /// The command only looks: no ranks are started for it.
    bool dry() const {
        return std::any_of(given.begin(), given.end(), [](auto& g) { return g.first == "dry-run"; });
    }
};

/// Throws (usage) for the first word that neither the program nor the chosen command (null: none) took.
void refuse_unknown(const CLI::App& app, const CLI::App* chosen) {
    std::vector<std::string> options, commands, left = app.remaining(/*recurse=*/true);
    if (left.empty()) return;
    for (const CLI::App* a : {&app, chosen}) {
        if (!a) continue;
        for (auto* option : a->get_options()) {
            for (auto& name : option->get_lnames()) options.push_back("--" + name);
            for (auto& name : option->get_snames()) options.push_back("-" + name);
        }
    }
    for (auto* sub : app.get_subcommands({})) commands.push_back(sub->get_name());
    bool is_option = left[0].starts_with("-");
    std::string hint = did_you_mean(left[0].substr(0, left[0].find('=')), is_option ? options : commands);
    throw Error({ErrorKind::usage, chosen ? "moelab " + chosen->get_name() : "moelab", fmt::format("unknown {} \"{}\"", is_option ? "option" : "command", left[0]),
                 is_option ? "one of its options" : "a command or a FILE.lua", hint.empty() ? "--help lists them" : hint, "", -1, ""});
}

/// Takes what follows the script's path off `words` and gives it back: those words are the script's own, options too. Where no
/// command is named, a FILE.lua gets "run" in front.
std::vector<std::string> split_script(std::vector<std::string>& words) {
    bool run = false;
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        if (word == "-e") return {};
        if (word == "-n" || word == "--ranks" || word == "--device" || word == "--threads") {
            ++i;
        } else if (!word.starts_with("-")) {
            if (!run && word == "run") {
                run = true;
                continue;
            }
            if (!run && !word.ends_with(".lua")) return {};
            if (!run) words.insert(words.begin() + long(i++), "run");
            std::vector<std::string> rest(words.begin() + long(i) + 1, words.end());
            words.resize(i + 1);
            return rest;
        }
    }
    return {};
}

/// A validator's answer about a word that it does not take; parts_of() takes it apart.
std::string refusal(const std::string& got, const std::string& want) { return fmt::format("got \"{}\", want {}", got, want); }

CLI::Validator whole_number() {
    return CLI::Validator([](std::string& text) {
        int64_t n = 0;
        auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
        bool is_one = error == std::errc() && end == text.data() + text.size() && n >= 1;
        return is_one ? "" : refusal(text, "a whole number of 1 or more");
    }, "");
}

CLI::Validator device_name() {
    return CLI::Validator([](std::string& text) { return text == "cpu" || text == "cuda" ? "" : refusal(text, "cpu or cuda"); }, "");
}

/// What CLI11 does not take, which it says in one text, as the parts of our errors.
ErrorParts parts_of(const CLI::ParseError& e) {
    std::string text = e.what();
    ErrorParts parts = {ErrorKind::usage, "moelab", text, "a command line that --help shows", "", "", -1, ""};
    std::smatch m;
    auto is = [&](const char* pattern) { return std::regex_match(text, m, std::regex(pattern)); };
    auto say = [&](const std::string& option, const std::string& got, const std::string& want) {
        parts.op += option.empty() ? "" : " " + option;
        parts.got = got;
        parts.want = want;
        parts.hint = "--help shows the usage";
    };
    if (is("(-[^:]*): got (\"[\\s\\S]*\"), want ([\\s\\S]*)")) say(m[1], m[2], m[3]);
    else if (is("(-[^:]*): 1 required (.*) missing")) say(m[1], "nothing", m[2]);
    else if (is("(-[^:]*): At Most 1 required but received ([0-9]+)")) say(m[1], fmt::format("{} values", m[2].str()), "one");
    else if (is("(-.*) excludes (-.*)")) say("", m[1].str() + " with " + m[2].str(), "one of them");
    else if (is("Could not convert: (-[^ ]*) = ([\\s\\S]*)")) say(m[1], fmt::format("\"{}\"", m[2].str()), "no value: it is a flag");       // numbers have validators
    return parts;
}

void add_options(CLI::App& app, CommandLine& c) {
    app.description("A sandbox for mixture-of-experts language models, driven by Lua. Without arguments: an interactive prompt, or the statements of standard input.");
    app.allow_extras();
    app.fallthrough();
    app.option_defaults()->always_capture_default(false);
    app.add_option("-e", c.code, "Runs one piece of Lua and prints its values")->type_name("CODE");
    app.add_option("-n,--ranks", c.ranks, "Number of processes, of the prompt too: each evaluates every input")->type_name("N")->check(whole_number());
    app.add_flag("--version", c.version, "Prints version, commit and LibTorch's version");
    app.add_option("--device", c.device, "Where models run; default: cuda where there is one a rank")->type_name("cpu|cuda")->check(device_name());
    app.add_option("--threads", c.threads, "Threads of each rank; default: OMP_NUM_THREADS, or the physical cores")->type_name("N")->check(whole_number());
    app.add_flag("--no-color", c.no_colour, "No colours, as with NO_COLOR=1");
    app.add_flag("--json", c.json, "Results, log lines and errors as one JSON object a line");
}

/// A subcommand whose words go to its Lua file; what it has of options of its own reaches it as `given`.
CLI::App* add_command(CLI::App& app, CommandLine& c, const char* name, const char* what, const char* words, const char* words_help) {
    auto* sub = app.add_subcommand(name, what);
    sub->allow_extras();
    sub->footer("As everywhere: --device cpu|cuda, --threads N, --json (one JSON object a line)");
    if (words) sub->add_option(words, c.words, words_help);
    return sub;
}

/// With a literal for its help, CLI11's own is ambiguous.
CLI::Option* add_flag(CLI::App& command, const std::string& name, const std::string& what) { return command.add_flag(name, what); }

void add_train(CLI::App& app, CommandLine& c) {
    auto* train = add_command(app, c, "train", "Trains a configuration: train --config NAME|FILE [key=value …]", "KEY=VALUE", "Changes of the configuration, such as training.learning_rate=1e-4");
    train->add_option("--config", "Ready name (moelab list) or JSON file")->type_name("NAME|FILE");
    train->add_option("-n,--ranks,--gpus", c.ranks, "Number of processes")->type_name("N")->check(whole_number());
    train->add_option("--steps", "Optimizer steps, for training.train_steps")->type_name("N")->check(whole_number());
    train->add_option("--name", "Name of the run's folder; default: experiment_name")->type_name("NAME");
    train->add_option("--init", "Start from these weights: a folder of safetensors")->type_name("DIR");
    train->add_option("--resume", "Go on from a checkpoint: its path, its name, or last")->type_name("PATH|last");
    add_flag(*train, "--dry-run", "Print launch command, configuration, parameters and memory, and train nothing");
    add_flag(*train, "--deepspeed", "Read the configuration's deepspeed section");
    add_flag(*train, "--submit", "Submit to the cluster (not built yet)");
    train->add_option("--script-only", "Write the cluster's job script (not built yet)")->type_name("FILE");
}

void add_commands(CLI::App& app, CommandLine& c) {
    auto* run = app.add_subcommand("run", "Runs an experiment: run [--ranks N] FILE.lua [arguments]; key=value reaches it as arg.options");
    run->allow_extras();
    run->add_option("-n,--ranks", c.ranks, "Number of processes")->type_name("N")->check(whole_number());
    run->add_option("FILE", c.file, "Lua file");
    add_train(app, c);
    auto* start = add_command(app, c, "quickstart", "Asks what to run, then runs it", nullptr, nullptr);
    auto* check_flag = add_flag(*start, "--check", "As moelab check");
    add_flag(*start, "--list", "As moelab list")->excludes(check_flag);
    add_command(app, c, "check", "Looks at this machine: what works, what is missing, how to get it", "KEY=VALUE", "output_dir=FOLDER: where runs will go");
    add_command(app, c, "list", "Ready configurations, experiments, benchmarks and commands", nullptr, nullptr);
    auto* config = add_command(app, c, "config", "Shows a configuration: config NAME|FILE [key=value …]", "NAME", "Ready name or JSON file, then changes as key=value");
    add_flag(*config, "--keys", "A table of every key, its default and its meaning");
    auto* sweep = add_command(app, c, "sweep", "Runs the points of a sweep that have no result: sweep FILE.lua [key=value …]", "FILE", "Lua file that makes a sweep, then its arguments");
    sweep->add_option("--jobs", "Points at once, as processes; default: what the file says, else one after the other here")->type_name("N")->check(whole_number());
    add_flag(*sweep, "--retry", "Run points that failed again");
    add_flag(*sweep, "--dry-run", "Check and show all points, and run nothing");
    auto* docs = add_command(app, c, "docs", "Writes the reference of functions, keys and commands as one page", nullptr, nullptr);
    auto* html = add_flag(*docs, "--html", "One HTML page; default where FILE ends in .html");
    add_flag(*docs, "--markdown", "Markdown; the default")->excludes(html);
    docs->add_option("--output,-o", "File to write; default: standard output")->type_name("FILE");
    auto* bench = add_command(app, c, "bench", "Measures a named job (moelab list shows them): bench NAME [steps=12] [warmup=3] [batch=] [seq=]", "NAME", "Name, then key=value options");
    add_flag(*bench, "--profile", "Also where the time of a step goes: by phase, and by GPU kernel or CPU operator");
}

/// What a command was given of options that go to its Lua file: all that fill no field of CommandLine.
std::vector<std::pair<std::string, std::string>> given_options(const CLI::App& command) {
    std::vector<std::pair<std::string, std::string>> given;
    for (auto* option : command.get_options()) {
        bool own = option->nonpositional() && option->count() > 0 && option->get_lnames()[0] != "help" && option->get_lnames()[0] != "ranks";
        if (own) given.emplace_back(option->get_lnames()[0], option->get_items_expected_max() == 0 ? "true" : option->results().back());
    }
    return given;
}

/// The command line, parsed. `chosen` becomes the command's name, "" for none.
CommandLine parse(CLI::App& app, std::vector<std::string> words, std::string& chosen) {
    CommandLine c;
    add_options(app, c);
    add_commands(app, c);
    std::vector<std::string> script_words = split_script(words);
    std::reverse(words.begin(), words.end());
    app.parse(words);
    auto used = app.get_subcommands();
    if (!used.empty()) chosen = used[0]->get_name();
    refuse_unknown(app, used.empty() ? nullptr : used[0]);
    if (chosen == "run") {
        if (c.file.empty()) throw Error({ErrorKind::usage, "moelab run", "no file", "run [--ranks N] FILE.lua [arguments]", "", "", -1, ""});
        c.words = script_words;
    } else if (!used.empty()) {
        c.given = given_options(*used[0]);
    }
    return c;
}

/// Prints an error once: as a JSON line, or as text on standard error, red in a terminal. What all ranks know, and errors of usage and configuration
/// before there is a session, come from all alike, so only rank 0 says them.
int report(ErrorParts error, bool json, std::optional<bool> all_know = {}) {
    int rank = launched_rank();
    bool same_on_all = all_know.value_or(error.kind == ErrorKind::usage || error.kind == ErrorKind::config || error.kind == ErrorKind::interrupted);
    if (rank > 0 && error.rank < 0) error.rank = rank;
    if (rank == 0 || !same_on_all) {
        std::fflush(stdout);
        if (json) fmt::print("{}\n", lua::to_json(error));
        else fmt::print(stderr, "{}\n", lua::describe(error, isatty(STDERR_FILENO) && !std::getenv("NO_COLOR")));
    }
    return Error(error).exit_code();
}

int finish(const lua::Session& session, const lua::Result& result, bool json, bool print_values) {
    if (result.error) return report(*result.error, json, session.is_of_several() ? std::optional(result.on_all_ranks) : std::nullopt);
    std::string line;
    for (auto& value : json ? result.json : result.values) line += (line.empty() ? "" : json ? "," : "\t") + value;
    if (json && !line.empty()) line = "{\"values\":[" + line + "]}";
    if (print_values && !line.empty() && launched_rank() == 0) fmt::print("{}\n", line);
    std::fflush(stdout);
    return 0;
}

/// The command that a person could type to start the same processes.
std::string launch_text(int ranks, std::vector<std::string> words) {
    std::erase(words, "--dry-run");
    std::vector<std::string> all = {"moelab"};
    if (ranks > 1) all = rank_command(ranks, words);
    else all.insert(all.end(), words.begin(), words.end());
    std::string text;
    for (auto& word : all) {
        bool plain = !word.empty() && word.find_first_of(" \t\"'\\$&|;<>()*?[]{}!#~`") == std::string::npos;
        std::string quoted = word;
        for (size_t at = 0; !plain && (at = quoted.find('\'', at)) != std::string::npos; at += 4) quoted.replace(at, 1, "'\\''");
        text += (text.empty() ? "" : " ") + (plain ? word : "'" + quoted + "'");
    }
    return text;
}

int execute(const CommandLine& c, const std::string& command, const std::vector<std::string>& words) {
    std::string typed = "moelab";
    for (auto& word : words) typed += " " + word;
    lua::SessionOptions options;
    options.quiet = launched_rank() > 0;
    options.command = typed;
    options.device = c.device;
    options.json = c.json;
    bool prompt = c.code.empty() && command.empty();
    options.interactive = prompt;
    options.give_up = [](int code) { _exit(code); };
    if (prompt && is_interactive_terminal()) options.page = page_help;
    lua::Session session(options);
    if (prompt && session.follows()) return run_follower(session);
    if (prompt) {
        int code = isatty(STDIN_FILENO) ? run_prompt(session) : run_piped(session, c.json);
        session.lead_out(code);
        return code;
    }
    running_session = &session;
    struct sigaction action = {};
    action.sa_handler = on_interrupt;
    sigaction(SIGINT, &action, nullptr);
    action.sa_handler = on_stop;
    for (int signal : {SIGTERM, SIGUSR1}) sigaction(signal, &action, nullptr);
    lua::Result result;
    lua::Arguments arguments = lua::Arguments::parse(c.words);
    if (!c.code.empty()) {
        result = session.eval(c.code, "-e");
    } else if (command == "run") {
        result = session.run_file(c.file, arguments);
    } else {
        arguments.given = c.given;
        if (c.json) arguments.given.emplace_back("json", "true");
        if (!c.device.empty()) arguments.given.emplace_back("device", c.device);
        arguments.given.emplace_back("ranks", std::to_string(c.ranks));
        arguments.given.emplace_back("launch", launch_text(c.ranks, words));
        result = session.run_command(command, arguments);
    }
    running_session = nullptr;
    log::status("");                // an error in the middle of training leaves it
    if (result.ok() && stop_requested()) return finish(session, result, c.json, !c.code.empty()), kInterruptedCode;
    int code = finish(session, result, c.json, !c.code.empty());
    if (result.on_all_ranks) session.leave();
    else if (result.error && session.is_of_several()) _exit(code);         // the others are elsewhere: nothing here may wait for them
    return code;
}

/// The whole program; gives its exit code.
int run_program(int argc, char** argv) {
    keep_memory();
    know_own_ranks();
    std::setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
    std::vector<std::string> words(argv + 1, argv + argc);
    if (!words.empty() && words[0] == "help") words.erase(words.begin()), words.push_back("--help");
    bool json = std::find(words.begin(), words.end(), "--json") != words.end();
    CLI::App app("", "moelab");
    try {
        std::string command;
        CommandLine c = parse(app, words, command);
        if (c.no_colour) setenv("NO_COLOR", "1", 1);
        if (c.version) {
            fmt::print("moelab {} (commit {}, LibTorch {})\n", kVersion, kCommit, kTorchVersion);
            return 0;
        }
        bool prompt = c.code.empty() && command.empty();
        if (c.ranks > 1 && !c.dry() && launched_rank() == 0 && !std::getenv("OMPI_COMM_WORLD_SIZE")) become_ranks(c.ranks, words, prompt && isatty(STDIN_FILENO));
        ForegroundOfRanks foreground;
        at::set_num_threads(choose_threads(c.threads));
        return execute(c, command, words);
    } catch (const CLI::CallForHelp& help) {
        return app.exit(help);
    } catch (const CLI::ParseError& e) {
        return report(parts_of(e), json);
    } catch (const Error& e) {
        return report(e.parts(), json);
    } catch (const std::exception& e) {
        return report({ErrorKind::internal, e.what(), "", "", "", "", -1, ""}, json);
    }
}
}  // namespace
}  // namespace moe::shell

int main(int argc, char** argv) { return moe::shell::run_program(argc, argv); }
