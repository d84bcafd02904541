#include "core/train/agree.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

namespace moe::train {
namespace {
using Json = nlohmann::json;

std::string packed(const ErrorParts& e, int rank) {
    Json j = {{"kind", int(e.kind)}, {"op", e.op}, {"got", e.got}, {"want", e.want}, {"hint", e.hint}, {"where", e.where}, {"rank", rank}};
    return j.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Error unpacked(const std::string& text) {
    Json j = Json::parse(text);
    return Error({ErrorKind(j.at("kind").get<int>()), j.at("op"), j.at("got"), j.at("want"), j.at("hint"), j.at("where"), j.at("rank"), ""});
}
}  // namespace

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
        problem = packed(e.parts(), world.rank());
    } catch (const std::exception& e) {
        problem = packed({ErrorKind::internal, e.what(), "", "", "", "", -1, ""}, world.rank());
    }
    int64_t first = world.all_reduce(problem.empty() ? int64_t(world.size()) : int64_t(world.rank()), dist::ReduceOp::min);
    if (first == world.size()) return;
    throw Error(unpacked(shared_text(problem, world, int(first))));
}

void on_rank_0(const dist::Group& world, const std::function<void()>& f) {
    agree(world, [&] {
        if (world.rank() == 0) f();
    });
}

}  // namespace moe::train
