#include "core/train/agree.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <tuple>

namespace moe::train {
namespace {
using Json = nlohmann::json;

ErrorParts& agreed_error() {
    thread_local ErrorParts last;
    return last;
}
}  // namespace

std::string packed_error(const ErrorParts& e) {
    Json j = {{"kind", int(e.kind)}, {"op", e.op}, {"got", e.got}, {"want", e.want}, {"hint", e.hint}, {"where", e.where}, {"rank", e.rank}, {"traceback", e.traceback}};
    return j.dump(-1, ' ', false, Json::error_handler_t::replace);
}

ErrorParts unpacked_error(const std::string& bytes) {
    Json j = Json::parse(bytes);
    return {ErrorKind(j.at("kind").get<int>()), j.at("op"), j.at("got"), j.at("want"), j.at("hint"), j.at("where"), j.at("rank"), j.at("traceback")};
}

void note_agreed(const ErrorParts& error) { agreed_error() = error; }
void forget_agreed() { agreed_error() = {}; }

bool is_agreed(const ErrorParts& e) {
    const ErrorParts& last = agreed_error();
    auto facts = [](const ErrorParts& x) { return std::tie(x.kind, x.op, x.got, x.want, x.hint, x.rank); };      // places and tracebacks grow on the way
    return !last.op.empty() && facts(last) == facts(e);
}

std::string shared_text(std::string text, const dist::Group& world, int root) {
    if (world.size() == 1) return text;
    int64_t size = world.all_reduce(world.rank() == root ? int64_t(text.size()) : int64_t(0));
    at::Tensor bytes = at::zeros({size}, at::kByte);
    if (world.rank() == root) std::copy(text.begin(), text.end(), bytes.data_ptr<uint8_t>());
    if (size > 0) world.broadcast(bytes, root);
    return {reinterpret_cast<const char*>(bytes.data_ptr<uint8_t>()), size_t(size)};
}

void agree(const dist::Group& world, const std::function<void()>& f) {
    if (world.size() == 1) return f();
    std::string problem;
    try {
        f();
    } catch (const Error& e) {
        problem = packed_error(e.parts());
    } catch (const std::exception& e) {
        problem = packed_error({ErrorKind::internal, e.what(), "", "", "", "", -1, ""});
    }
    int64_t first = world.all_reduce(problem.empty() ? int64_t(world.size()) : int64_t(world.rank()), dist::ReduceOp::min);
    if (first == world.size()) return;
    bool on_all = world.all_reduce(int64_t(problem.empty()), dist::ReduceOp::max) == 0;
    ErrorParts parts = unpacked_error(shared_text(problem, world, int(first)));
    if (!on_all) parts.rank = int(first);
    note_agreed(parts);
    throw Error(parts);
}

void on_rank_0(const dist::Group& world, const std::function<void()>& f) {
    agree(world, [&] {
        if (world.rank() == 0) f();
    });
}

}  // namespace moe::train
