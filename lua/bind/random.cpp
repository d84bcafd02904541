// Random numbers: moe.seed, generator objects, draws that fill a tensor.
#include "core/tensor/check.h"
#include "lua/bind/bind.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <mutex>

namespace moe::lua {

template <>
struct TypeName<at::Generator> {
    static constexpr const char* value = "generator";
};

std::optional<at::Generator> generator_option(const Options& options, at::Device device) {
    lua_State* L = options.state();
    options.push("generator");
    if (lua_isnil(L, -1)) {
        lua_pop(L, 1);
        return std::nullopt;
    }
    at::Generator g = check<at::Generator>(L, lua_gettop(L), "generator");
    lua_pop(L, 1);
    MOE_CHECK(g.device().type() == device.type(), device, running(L) + ": generator", "one of " + g.device().str(), "one of " + device.str(), "moe.generator(seed, {device = …})");
    return g;
}

namespace {
using at::Generator;
using at::Tensor;

int seed(lua_State* L) {
    at::manual_seed(uint64_t(check_integer(L, 1, "seed")));
    return 0;
}
int make_generator(lua_State* L) {
    uint64_t seed = is_nothing(L, 1) ? 0 : uint64_t(check_integer(L, 1, "seed"));
    Options o(L, 2, {"device"});
    at::Device device = o.has("device") ? device_named(o.string("device", "")) : at::Device(at::kCPU);
    Generator g = device.is_cpu() ? at::detail::createCPUGenerator() : at::globalContext().getAcceleratorHooksInterface(device.type()).getNewGenerator(device.index());
    std::lock_guard lock(g.mutex());
    g.set_current_seed(seed);
    push(L, g);
    return 1;
}

int set_seed(lua_State* L) {
    Generator& g = self<Generator>(L);
    std::lock_guard lock(g.mutex());
    g.set_current_seed(uint64_t(check_integer(L, 2, "seed")));
    return lua_settop(L, 1), 1;
}
int get_state(lua_State* L) {
    Generator& g = self<Generator>(L);
    std::lock_guard lock(g.mutex());
    return push_tensor(L, g.get_state());
}
int set_state(lua_State* L) {
    Generator& g = self<Generator>(L);
    Tensor& state = check_tensor(L, 2, "state");
    std::lock_guard lock(g.mutex());
    g.set_state(state);
    return lua_settop(L, 1), 1;
}
int field_seed(lua_State* L) { return lua_pushinteger(L, lua_Integer(self<Generator>(L).current_seed())), 1; }
int field_device(lua_State* L) { return push_string(L, self<Generator>(L).device().str()), 1; }
int text(lua_State* L) {
    auto* box = test_box<Generator>(L, 1);
    push_string(L, box && *box ? fmt::format("generator: seed {}, {}", (*box)->current_seed(), (*box)->device().str()) : "generator (freed)");
    return 1;
}

const Binding kMethods[] = {
    {"seed", set_seed, "g:seed(n): starts the draws of seed n. Returns g."},
    {"state", get_state, "g:state(): where the draws are, a tensor of bytes for set_state."},
    {"set_state", set_state, "g:set_state(state): goes on from where state was taken. Returns g."},
};
const Binding kFields[] = {
    {"initial_seed", field_seed, "g.initial_seed: the seed that it was last given."},
    {"device", field_device, "g.device: where it draws, \"cpu\" or \"cuda:0\"."},
};
const Binding kOperators[] = {{"__tostring", text, "tostring(g): seed and device."}};

// --- draws that fill a tensor, and draws by weight ---

std::optional<Generator> drawn_with(lua_State* L, int index) {
    Options o(L, index, {"generator"});
    return generator_option(o, self_tensor(L).device());
}
double number_or(lua_State* L, int index, const char* name, double fallback) { return is_nothing(L, index) ? fallback : check_number(L, index, name); }

int normal_(lua_State* L) {
    double mean = number_or(L, 2, "mean", 0), deviation = number_or(L, 3, "deviation", 1);
    MOE_CHECK(deviation >= 0, usage, running(L) + ": deviation", fmt::to_string(deviation), "0 or more", "");
    self_tensor(L).normal_(mean, deviation, drawn_with(L, 4));
    return lua_settop(L, 1), 1;
}
int uniform_(lua_State* L) {
    double low = number_or(L, 2, "low", 0), high = number_or(L, 3, "high", 1);
    MOE_CHECK(low <= high, usage, running(L), fmt::format("[{}, {})", low, high), "low <= high", "");
    self_tensor(L).uniform_(low, high, drawn_with(L, 4));
    return lua_settop(L, 1), 1;
}
int bernoulli(lua_State* L) {
    Tensor& p = self_tensor(L);
    MOE_CHECK(p.numel() == 0 || (p.min().item<double>() >= 0 && p.max().item<double>() <= 1), usage, running(L), "probabilities outside of [0, 1], or NaN", "t in [0, 1]", "");
    return push_tensor(L, at::bernoulli(p, drawn_with(L, 2)));
}
int multinomial(lua_State* L) {
    Tensor& weights = self_tensor(L);
    int64_t n = check_integer(L, 2, "n");
    Options o(L, 3, {"replacement", "generator"});
    bool again = o.boolean("replacement", false);
    MOE_CHECK(weights.dim() == 1 || weights.dim() == 2, shape, running(L), shape_text(weights.sizes()), "[C] or [N, C]", "");
    MOE_CHECK(at::isFloatingType(weights.scalar_type()), dtype, running(L), dtype_text(weights.scalar_type()), "weights of a float dtype", "t:float()");
    MOE_CHECK(n > 0 && (again || n <= weights.size(-1)), usage, running(L) + ": n", fmt::format("{} of {}", n, weights.size(-1)), "at most as many as there are, unless with replacement", "");
    MOE_CHECK(weights.numel() == 0 || (at::isfinite(weights).all().item<bool>() && weights.min().item<double>() >= 0 && weights.sum(-1).min().item<double>() > 0), usage, running(L),
              "weights that are negative, not finite, or all 0", "weights of 0 or more with a sum above 0", "");
    return push_tensor(L, at::multinomial(weights, n, again, generator_option(o, weights.device())));
}

const Binding kTensorMethods[] = {
    {"normal_", normal_, "t:normal_(mean = 0, deviation = 1, {generator =}): fills t with normal draws. Returns t."},
    {"uniform_", uniform_, "t:uniform_(low = 0, high = 1, {generator =}): fills t with uniform draws. Returns t."},
    {"bernoulli", bernoulli, "t:bernoulli({generator =}): 1 with probability t, else 0."},
    {"multinomial", multinomial,
     "t:multinomial(n, {replacement = false, generator =}): n ids drawn by weights t [C] or by each row of [N, C], int64 [n] or [N, n].\n"
     "Example: print(moe.tensor({0.1, 0.0, 0.9}):multinomial(2))"},
};
const Binding kFunctions[] = {
    {"seed", seed, "moe.seed(n): sets the generator of moe.rand, moe.randn and all other draws that name none. Models and data have seeds of their own in the configuration."},
    {"generator", make_generator,
     "moe.generator(seed, {device = \"cpu\"}): a stream of draws of its own, for the option generator of moe.randn and others.\n"
     "Example: local g = moe.generator(7); print(moe.randn({2}, {generator = g}), moe.randn({2}, {generator = g:seed(7)}))"},
};
}  // namespace

std::span<const Binding> tensor_random() { return kTensorMethods; }

void open_random(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    register_type<Generator>(L, {.name = nullptr, .help = "generator: a stream of random draws, from moe.generator(seed).", .methods = kMethods, .fields = kFields, .meta = kOperators});
}
}  // namespace moe::lua
