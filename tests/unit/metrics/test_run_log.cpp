#include "core/metrics/run_log.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

using namespace moe;
using moe::test::error_of;
using namespace moe::metrics;
namespace fs = std::filesystem;

namespace {
std::string content(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
}

const std::vector<int64_t> kCounts = {1, 2, 3, 4, 5, int64_t(1) << 40};
}  // namespace

TEST_CASE("run log: a reader sees every record as soon as it is written", "[metrics]") {
    test::Folder folder;
    Reader reader(folder.path());
    REQUIRE(reader.poll() == 0);   // no file yet
    REQUIRE(reader.last_step() == -1);
    Writer writer(folder.path());
    REQUIRE(writer.last_attempt() == -1);
    REQUIRE(reader.poll() == 0);
    writer.scalars(1, 0, {{"loss", 5.5}, {"lr", 1e-4}});
    REQUIRE(reader.poll() == 1);
    writer.scalars(2, 0, {{"loss", NAN}, {"grad_norm", INFINITY}});
    writer.matrix(2, 0, "load", 2, 3, std::span<const int64_t>(kCounts));
    std::vector<float> flow = {0.25f, 0.75f};
    writer.matrix(2, 0, "flow", 1, 2, std::span<const float>(flow));
    writer.matrix(2, 0, "nothing", 0, 4, std::span<const float>());
    REQUIRE(reader.poll() == 4);
    REQUIRE(reader.poll() == 0);
    REQUIRE(reader.scalar_names() == std::vector<std::string>{"loss", "lr", "grad_norm"});
    REQUIRE(reader.matrix_names() == std::vector<std::string>{"load", "flow", "nothing"});
    Column loss = reader.column("loss");
    REQUIRE(loss.steps == std::vector<int64_t>{1, 2});
    REQUIRE(loss.values[0] == 5.5);
    REQUIRE(std::isnan(loss.values[1]));
    REQUIRE(reader.column("grad_norm").steps == std::vector<int64_t>{2});
    REQUIRE(std::isinf(reader.column("grad_norm").values[0]));
    REQUIRE(reader.column("other").steps.empty());
    const Matrix* load = reader.matrix("load", 2);
    REQUIRE(load != nullptr);
    REQUIRE((load->rows == 2 && load->cols == 3));
    REQUIRE(std::get<std::vector<int64_t>>(load->values) == kCounts);
    REQUIRE(load->at(1, 0) == 4);
    REQUIRE(error_of([&] { load->at(2, 0); }).kind() == ErrorKind::shape);
    REQUIRE(std::get<std::vector<float>>(reader.matrix("flow", 2)->values) == flow);
    REQUIRE(reader.matrix("load", 1) == nullptr);
    REQUIRE(reader.matrix_steps("load") == std::vector<int64_t>{2});
    REQUIRE(reader.last_step() == 2);
    Reader late(folder.path());
    REQUIRE(late.poll() == 5);
    REQUIRE(late.column("lr").values == std::vector<double>{1e-4});
}

TEST_CASE("run log: the latest attempt of each step is shown", "[metrics]") {
    test::Folder folder;
    {
        Writer writer(folder.path());
        for (int step = 1; step <= 4; ++step) {
            writer.scalars(step, 0, {{"loss", double(step)}});
            writer.matrix(step, 0, "load", 2, 3, std::span<const int64_t>(kCounts));
        }
    }
    Writer writer(folder.path());
    REQUIRE(writer.last_attempt() == 0);
    std::vector<int64_t> zeros(2, 0);
    writer.scalars(3, 1, {{"loss", 30.0}});
    writer.matrix(3, 1, "load", 1, 2, std::span<const int64_t>(zeros));
    writer.scalars(2, 0, {{"loss", 20.0}});   // the same attempt again: the later value
    Reader reader(folder.path());
    REQUIRE(reader.poll() == 11);
    REQUIRE(reader.column("loss").values == std::vector<double>{1, 20, 30, 4});
    REQUIRE(reader.column("loss").attempts == std::vector<int64_t>{0, 0, 1, 0});
    REQUIRE(reader.matrix("load", 3)->rows == 1);
    REQUIRE(reader.matrix("load", 4)->rows == 2);
    REQUIRE(reader.last_step() == 3);
    REQUIRE(reader.last_attempt() == 1);
}

TEST_CASE("run log: a torn last record is not read, and cut off by the next writer", "[metrics]") {
    test::Folder folder;
    std::string path = run_log_path(folder.path());
    size_t whole = 0;
    {
        Writer writer(folder.path());
        writer.scalars(1, 0, {{"loss", 1.0}});
        whole = content(path).size();
        writer.scalars(2, 0, {{"loss", 2.0}});
    }
    std::string both = content(path);
    for (size_t size = whole; size < both.size(); ++size) {
        folder.write("run.moelog", both.substr(0, size));
        Reader reader(folder.path());
        REQUIRE(reader.poll() == 1);
        REQUIRE(reader.poll() == 0);
        Writer(folder.path()).scalars(3, 1, {{"loss", 3.0}});
        REQUIRE(reader.poll() == 1);
        REQUIRE(reader.column("loss").values == std::vector<double>{1, 3});
    }
    // The last record's bytes are all there but wrong, as when blocks reach the disk in another order.
    std::string wrong = both;
    wrong.back() ^= 1;
    folder.write("run.moelog", wrong);
    Reader reader(folder.path());
    REQUIRE(reader.poll() == 1);
    folder.write("run.moelog", both);
    REQUIRE(reader.poll() == 1);
}

TEST_CASE("run log: all zeros behind the last record are a torn tail", "[metrics]") {
    test::Folder folder;
    { Writer(folder.path()).scalars(1, 0, {{"loss", 1.0}}); }
    std::string bytes = content(run_log_path(folder.path()));
    folder.write("run.moelog", bytes + std::string(4096, '\0'));
    Reader reader(folder.path());
    REQUIRE(reader.poll() == 1);
    Writer(folder.path()).scalars(2, 1, {{"loss", 2.0}});
    REQUIRE(reader.poll() == 1);
    REQUIRE(reader.last_step() == 2);
}

TEST_CASE("run log: damage before the end and foreign files are errors", "[metrics]") {
    test::Folder folder;
    {
        Writer writer(folder.path());
        for (int step = 0; step < 3; ++step) writer.scalars(step, 0, {{"loss", 1.0}});
    }
    std::string good = content(run_log_path(folder.path()));
    for (size_t at : {size_t(8), size_t(12), size_t(20), good.size() / 2}) {
        std::string bytes = good;
        bytes[at] ^= 0x55;
        folder.write("run.moelog", bytes);
        INFO(at);
        REQUIRE(error_of([&] { Reader(folder.path()).poll(); }).kind() == ErrorKind::data);
        REQUIRE(error_of([&] { Writer(folder.path()); }).kind() == ErrorKind::data);
        REQUIRE(content(run_log_path(folder.path())) == bytes);   // nothing was cut
    }
    folder.write("run.moelog", "step,loss\n1,5.0\n");
    REQUIRE(error_of([&] { Reader(folder.path()).poll(); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { Writer(folder.path()); }).kind() == ErrorKind::data);
    folder.write("run.moelog", "moel");   // a crash while the first bytes were written
    REQUIRE(Reader(folder.path()).poll() == 0);
    Writer(folder.path()).scalars(1, 0, {{"loss", 1.0}});
    Reader reader(folder.path());
    REQUIRE(reader.poll() == 1);
}

TEST_CASE("run log: one writer at a time, its lock ends with it", "[metrics]") {
    test::Folder folder;
    {
        Writer first(folder / "metrics");
        Error e = error_of([&] { Writer(folder / "metrics"); });
        REQUIRE(e.kind() == ErrorKind::state);
        REQUIRE(e.parts().got.find(folder / "metrics") != std::string::npos);
    }
    Writer again(folder / "metrics");
}

TEST_CASE("run log: full disks, folders that cannot be made and wrong sizes are errors", "[metrics]") {
    test::Folder folder;
    fs::create_symlink("/dev/full", run_log_path(folder.path()));
    Error full = error_of([&] { Writer(folder.path()).scalars(1, 0, {{"loss", 1.0}}); });
    REQUIRE(full.kind() == ErrorKind::io);
    REQUIRE(full.parts().hint.find("full") != std::string::npos);
    folder.write("file", "x");
    REQUIRE(error_of([&] { Writer(folder / "file"); }).kind() == ErrorKind::io);
    REQUIRE(error_of([&] { Writer(folder / "file/below"); }).kind() == ErrorKind::io);
    REQUIRE(error_of([] { Writer("/proc/moelab"); }).kind() == ErrorKind::io);
    Writer writer(folder / "good");
    REQUIRE(error_of([&] { writer.matrix(1, 0, "load", 2, 2, std::span<const int64_t>(kCounts)); }).kind() == ErrorKind::shape);
    REQUIRE(error_of([&] { writer.scalars(1, -1, {}); }).kind() == ErrorKind::usage);
    REQUIRE(error_of([&] { writer.scalars(1, 0, {{std::string(70000, 'x'), 1.0}}); }).kind() == ErrorKind::usage);
    Reader reader(folder / "good");
    REQUIRE(reader.poll() == 0);   // nothing of the refused records is there
}

TEST_CASE("run log: records larger than the reading window come through", "[metrics]") {
    test::Folder folder;
    std::vector<int64_t> big(700'000);
    for (size_t i = 0; i < big.size(); ++i) big[i] = int64_t(i);
    Writer writer(folder.path());
    writer.scalars(1, 0, {{"loss", 1.0}});
    writer.matrix(1, 0, "big", 700, 1000, std::span<const int64_t>(big));
    writer.matrix(2, 0, "big", 1000, 700, std::span<const int64_t>(big));
    writer.scalars(2, 0, {{"loss", 2.0}});
    Reader reader(folder.path());
    REQUIRE(reader.poll() == 4);
    REQUIRE(std::get<std::vector<int64_t>>(reader.matrix("big", 2)->values) == big);
    REQUIRE(reader.column("loss").values == std::vector<double>{1, 2});
}
