// The whole model once more, as plain loops over std::vector<double>: no tensor, no autograd, nothing of core but the configuration.
// Written from the formulas (DeepSeek-V2 and DeepSeek-V3 technical reports, names of Hugging Face's checkpoints) and by document, not
// by row: a token that is not there is left out, where the model carries it along masked.
#pragma once
#include "core/config/config.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

namespace moe::test {

using Vec = std::vector<double>;

/// A document's tokens in one row; the first `positions` are inputs. One more token is the last input's target only: the row ends there.
struct Document {
    std::vector<int64_t> tokens;
    int64_t positions = 0;
};

/// Losses as the model names them, each with its scale.
struct PlainLosses {
    double loss = 0, mtp = 0, balance = 0, z = 0;
    double total() const { return loss + mtp + balance + z; }
};

class PlainModel {
public:
    Config config;
    std::map<std::string, Vec> weights;                   ///< by checkpoint name
    std::map<int64_t, Vec> bias;                          ///< of the routers, by layer
    std::vector<std::vector<Document>> rows;              ///< [B]; what is left of a row's S positions is padding
    int64_t S = 0;
    /// What a router decided for a token: experts in the order of falling choice, and whether capacity kept them.
    struct Decision { std::vector<int64_t> chosen; std::vector<char> kept; };
    std::map<int64_t, std::vector<std::vector<Decision>>> decisions;      ///< [layer][row][position]
    bool frozen = false;                                  ///< take the decisions of the last run: gradients are those of a fixed choice

    PlainLosses run();
    /// Tokens that module k (0: the main model) has: those with a token k places on in their document. num_tokens(k + 1) have a target.
    int64_t num_tokens(int64_t k) const;
    struct Place { int64_t document = -1, at = 0; };
    Place place(size_t row, int64_t s) const;

private:
    using Grid = std::vector<std::vector<Vec>>;           // [row][position], empty where there is no token
    bool has(size_t row, int64_t s, int64_t k) const;
    int64_t token(size_t row, int64_t s, int64_t k) const;
    Vec product(const std::string& name, const Vec& x) const;
    Vec root_mean_square(const Vec& x, const std::string& name, double eps) const;
    Vec norm(const Vec& x, const std::string& name) const;
    Vec embedding(int64_t id) const;
    Vec feed_forward(const std::string& prefix, const Vec& x) const;
    Vec rotated(Vec x, int64_t position) const;
    void attention(int64_t layer, int64_t k, Grid& x) const;
    void mixture(int64_t layer, int64_t k, Grid& x, PlainLosses& losses);
    void decide(int64_t layer, int64_t k, const Grid& scores);
    double router_losses(int64_t k, const Grid& scores, const std::vector<std::vector<Decision>>& chosen) const;
    double cross_entropy(const Vec& final, int64_t target) const;
    template <class F> void each(int64_t k, F f) const {
        for (size_t b = 0; b < rows.size(); ++b)
            for (int64_t s = 0; s < S; ++s)
                if (has(b, s, k)) f(b, s);
    }
};

// ---- documents ----
inline PlainModel::Place PlainModel::place(size_t row, int64_t s) const {
    for (size_t d = 0; d < rows[row].size(); ++d) {
        if (s < rows[row][d].positions) return {int64_t(d), s};
        s -= rows[row][d].positions;
    }
    return {};
}
inline bool PlainModel::has(size_t row, int64_t s, int64_t k) const {
    Place p = place(row, s);
    return p.document >= 0 && p.at + k < int64_t(rows[row][size_t(p.document)].tokens.size());
}
inline int64_t PlainModel::token(size_t row, int64_t s, int64_t k) const {
    Place p = place(row, s);
    return rows[row][size_t(p.document)].tokens[size_t(p.at + k)];
}
inline int64_t PlainModel::num_tokens(int64_t k) const {
    int64_t n = 0;
    each(k, [&](size_t, int64_t) { ++n; });
    return n;
}

// ---- pieces ----
inline Vec PlainModel::product(const std::string& name, const Vec& x) const {
    const Vec& w = weights.at(name + ".weight");
    Vec y(w.size() / x.size());
    for (size_t o = 0; o < y.size(); ++o)
        for (size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
    return y;
}
inline Vec PlainModel::root_mean_square(const Vec& x, const std::string& name, double eps) const {
    const Vec& g = weights.at(name + ".weight");
    double square = 0;
    for (double v : x) square += v * v / double(x.size());
    Vec y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(square + eps) * g[i];
    return y;
}
inline Vec PlainModel::norm(const Vec& x, const std::string& name) const {
    if (config.model.norm_type == "rmsnorm") return root_mean_square(x, name, config.model.norm_eps);
    const Vec &g = weights.at(name + ".weight"), &beta = weights.at(name + ".bias");
    double mean = 0, variance = 0;
    for (double v : x) mean += v / double(x.size());
    for (double v : x) variance += (v - mean) * (v - mean) / double(x.size());
    Vec y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = (x[i] - mean) / std::sqrt(variance + config.model.norm_eps) * g[i] + beta[i];
    return y;
}
inline Vec PlainModel::embedding(int64_t id) const {
    const Vec& table = weights.at("model.embed_tokens.weight");
    auto D = config.model.mla.d_model;
    return {table.begin() + id * D, table.begin() + (id + 1) * D};
}
inline Vec PlainModel::feed_forward(const std::string& prefix, const Vec& x) const {
    Vec gate = product(prefix + "gate_proj", x), up = product(prefix + "up_proj", x);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    return product(prefix + "down_proj", gate);
}
inline Vec PlainModel::rotated(Vec x, int64_t position) const {
    auto& c = config.model.mla;
    size_t half = x.size() / 2;
    Vec y(x.size());
    for (size_t i = 0; i < half; ++i) {
        size_t a = c.rope_interleave ? 2 * i : i, b = c.rope_interleave ? 2 * i + 1 : i + half;
        double angle = double(position) * std::pow(c.rope_theta, -double(2 * i) / double(x.size()));
        y[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
        y[b] = x[a] * std::sin(angle) + x[b] * std::cos(angle);
    }
    return y;
}
inline double PlainModel::cross_entropy(const Vec& final, int64_t target) const {
    Vec logits = config.model.tie_word_embeddings ? product("model.embed_tokens", final) : product("lm_head", final);
    double sum = 0;
    for (double l : logits) sum += std::exp(l);
    return std::log(sum) - logits[size_t(target)];
}

// ---- attention: x += W_o · heads ----
inline void PlainModel::attention(int64_t layer, int64_t k, Grid& x) const {
    auto& c = config.model.mla;
    std::string p = "model.layers." + std::to_string(layer) + ".", a = p + "self_attn.";
    auto H = size_t(c.num_heads), G = size_t(config.model.num_kv_heads()), nope = size_t(c.qk_nope_head_dim), rope = size_t(c.use_rope ? c.qk_rope_head_dim : 0), v = size_t(c.v_head_dim), L = size_t(c.d_latent);
    Grid q(rows.size(), std::vector<Vec>(size_t(S))), kv = q, k_rope = q;
    each(k, [&](size_t b, int64_t s) {
        Vec h = norm(x[b][size_t(s)], p + "input_layernorm");
        q[b][size_t(s)] = c.q_lora_rank ? product(a + "q_b_proj", root_mean_square(product(a + "q_a_proj", h), a + "q_a_layernorm", 1e-6)) : product(a + "q_proj", h);
        Vec latent = product(a + "kv_a_proj_with_mqa", h);
        k_rope[b][size_t(s)] = rotated({latent.begin() + int64_t(L), latent.end()}, s);
        latent.resize(L);
        kv[b][size_t(s)] = product(a + "kv_b_proj", root_mean_square(latent, a + "kv_a_layernorm", 1e-6));
    });
    each(k, [&](size_t b, int64_t s) {
        Vec out(H * v);
        for (size_t h = 0; h < H; ++h) {
            const double* query = &q[b][size_t(s)][h * (nope + rope)];
            Vec turned = rotated({query + nope, query + nope + rope}, s), weight;
            double sum = 0;
            for (int64_t j = 0; j <= s; ++j) {
                bool seen = place(b, j).document == place(b, s).document && (!c.sliding_window || s - j < *c.sliding_window);
                const double* key = seen ? &kv[b][size_t(j)][h * G / H * (nope + v)] : nullptr;
                double score = 0;
                for (size_t d = 0; seen && d < nope; ++d) score += query[d] * key[d];
                for (size_t d = 0; seen && d < rope; ++d) score += turned[d] * k_rope[b][size_t(j)][d];
                weight.push_back(seen ? std::exp(score / std::sqrt(double(nope + rope))) : 0);
                sum += weight.back();
            }
            for (int64_t j = 0; j <= s; ++j)
                for (size_t d = 0; weight[size_t(j)] > 0 && d < v; ++d) out[h * v + d] += weight[size_t(j)] / sum * kv[b][size_t(j)][h * G / H * (nope + v) + nope + d];
        }
        Vec y = product(a + "o_proj", out);
        for (size_t i = 0; i < y.size(); ++i) x[b][size_t(s)][i] += y[i];
    });
}

// ---- router and experts: x += shared(h) + Σ_kept w_e expert_e(h) ----
inline void PlainModel::decide(int64_t layer, int64_t k, const Grid& scores) {
    auto& m = config.model.moe;
    auto E = size_t(m.num_experts), K = size_t(m.num_experts_per_token), per = E / size_t(m.n_group);
    auto& out = decisions[layer];
    out.assign(rows.size(), std::vector<Decision>(size_t(S)));
    auto weight_of = [&](size_t b, size_t s, size_t i) {
        auto& d = out[b][s];
        double sum = 0;
        for (int64_t e : d.chosen) sum += scores[b][s][size_t(e)];
        return scores[b][s][size_t(d.chosen[i])] / (m.norm_topk_prob ? sum : 1);
    };
    each(k, [&](size_t b, int64_t s) {
        Vec choice = scores[b][size_t(s)];
        for (size_t e = 0; e < E && m.use_aux_loss_free; ++e) choice[e] += bias.at(layer)[e];
        std::vector<std::pair<double, size_t>> groups, experts;
        for (size_t g = 0; g < size_t(m.n_group); ++g) {
            Vec members(choice.begin() + int64_t(g * per), choice.begin() + int64_t((g + 1) * per));
            std::sort(members.rbegin(), members.rend());
            groups.push_back({m.use_aux_loss_free && per > 1 ? members[0] + members[1] : members[0], g});
        }
        std::sort(groups.rbegin(), groups.rend());
        for (size_t i = 0; i < size_t(m.topk_group); ++i)
            for (size_t e = groups[i].second * per; e < (groups[i].second + 1) * per; ++e) experts.push_back({choice[e], e});
        std::sort(experts.rbegin(), experts.rend());
        auto& d = out[b][size_t(s)];
        for (size_t i = 0; i < K; ++i) d.chosen.push_back(int64_t(experts[i].second));
        d.kept.assign(K, 1);
    });
    if (!m.capacity_factor) return;
    auto room = size_t(std::max<int64_t>(m.min_expert_capacity, int64_t(std::ceil(*m.capacity_factor * double(S) * double(K) / double(E)))));
    for (size_t b = 0; b < rows.size(); ++b)
        for (size_t e = 0; e < E; ++e) {
            std::vector<std::pair<double, char*>> wanting;                 // in the order of positions
            for (size_t s = 0; s < size_t(S); ++s)
                for (size_t i = 0; i < out[b][s].chosen.size(); ++i)
                    if (out[b][s].chosen[i] == int64_t(e)) wanting.push_back({weight_of(b, s, i), &out[b][s].kept[i]});
            std::stable_sort(wanting.begin(), wanting.end(), [](auto& x, auto& y) { return x.first > y.first; });
            for (size_t i = room; i < wanting.size(); ++i) *wanting[i].second = 0;
        }
}

/// Switch over the micro-batch and sequence-wise, both with f_i = N/(K n) c_i and times n, as shares of the main model's tokens.
inline double PlainModel::router_losses(int64_t k, const Grid& scores, const std::vector<std::vector<Decision>>& chosen) const {
    auto& m = config.model.moe;
    auto E = size_t(m.num_experts), K = size_t(m.num_experts_per_token);
    auto balance = [&](size_t first, size_t last) {
        Vec P(E), c(E);
        double n = 0, sum = 0;
        each(k, [&](size_t b, int64_t s) {
            if (b < first || b >= last) return;
            double total = 0;
            for (double x : scores[b][size_t(s)]) total += x;
            for (size_t e = 0; e < E; ++e) P[e] += scores[b][size_t(s)][e] / total;
            for (int64_t e : chosen[b][size_t(s)].chosen) c[size_t(e)] += 1;
            n += 1;
        });
        for (size_t e = 0; e < E && n > 0; ++e) sum += double(E) / (double(K) * n) * c[e] * P[e] / n;
        return n * sum;
    };
    double total = m.router_aux_loss_weight * balance(0, rows.size());
    for (size_t b = 0; b < rows.size(); ++b) total += m.sequence_aux_loss_weight * balance(b, b + 1);
    return total / double(num_tokens(0));
}

inline void PlainModel::mixture(int64_t layer, int64_t k, Grid& x, PlainLosses& losses) {
    auto& m = config.model.moe;
    std::string p = "model.layers." + std::to_string(layer) + ".";
    Grid hidden(rows.size(), std::vector<Vec>(size_t(S))), scores = hidden;
    each(k, [&](size_t b, int64_t s) {
        Vec h = hidden[b][size_t(s)] = norm(x[b][size_t(s)], p + "post_attention_layernorm"), logits = product(p + "mlp.gate", h), &score = scores[b][size_t(s)];
        double sum = 0, partition = 0;
        for (double l : logits) {
            partition += std::exp(l);
            sum += std::exp(l / m.router_temperature);
        }
        for (double l : logits) score.push_back(m.scoring_func == "softmax" ? std::exp(l / m.router_temperature) / sum : 1 / (1 + std::exp(-l / m.router_temperature)));
        losses.z += m.router_z_loss_weight * std::log(partition) * std::log(partition) / double(num_tokens(0));
    });
    if (!frozen) decide(layer, k, scores);
    losses.balance += router_losses(k, scores, decisions.at(layer));
    each(k, [&](size_t b, int64_t s) {
        auto& d = decisions.at(layer)[b][size_t(s)];
        const Vec &h = hidden[b][size_t(s)], &score = scores[b][size_t(s)];
        Vec& out = x[b][size_t(s)];
        double chosen_sum = 0;
        for (int64_t e : d.chosen) chosen_sum += score[size_t(e)];
        for (size_t i = 0; i < d.chosen.size(); ++i) {
            if (!d.kept[i]) continue;                                      // its weight is lost: the others' stay what they were
            Vec y = feed_forward(p + "mlp.experts." + std::to_string(d.chosen[i]) + ".", h);
            double w = score[size_t(d.chosen[i])] / (m.norm_topk_prob ? chosen_sum : 1) * m.routed_scaling_factor;
            for (size_t j = 0; j < y.size(); ++j) out[j] += w * y[j];
        }
        if (m.num_shared_experts == 0) return;
        Vec shared = feed_forward(p + "mlp.shared_experts.", h);
        for (size_t j = 0; j < shared.size(); ++j) out[j] += shared[j];
    });
}

// ---- the whole ----
inline PlainLosses PlainModel::run() {
    PlainLosses losses;
    int64_t depth = config.training.mtp_depth(), layers = config.model.num_layers;
    Grid x(rows.size(), std::vector<Vec>(size_t(S))), final = x;
    each(0, [&](size_t b, int64_t s) { x[b][size_t(s)] = embedding(token(b, s, 0)); });
    for (int64_t layer = 0; layer < layers; ++layer) {
        attention(layer, 0, x);
        std::string p = "model.layers." + std::to_string(layer) + ".";
        if (config.model.is_moe_layer(layer)) mixture(layer, 0, x, losses);
        else each(0, [&](size_t b, int64_t s) {
            Vec y = feed_forward(p + "mlp.", norm(x[b][size_t(s)], p + "post_attention_layernorm"));
            for (size_t i = 0; i < y.size(); ++i) x[b][size_t(s)][i] += y[i];
        });
    }
    auto head = [&](int64_t k, const std::string& name) {                  // what it read stays for the next module
        double sum = 0;
        each(k, [&](size_t b, int64_t s) {
            final[b][size_t(s)] = norm(x[b][size_t(s)], name);
            if (has(b, s, k + 1)) sum += cross_entropy(final[b][size_t(s)], token(b, s, k + 1));
        });
        return sum / double(num_tokens(k + 1));
    };
    losses.loss = head(0, "model.norm");
    for (int64_t k = 1; k <= depth; ++k) {
        int64_t layer = layers + k - 1;
        std::string p = "model.layers." + std::to_string(layer) + ".";
        each(k, [&](size_t b, int64_t s) {
            Vec joined = norm(embedding(token(b, s, k)), p + "enorm"), before = norm(final[b][size_t(s)], p + "hnorm");
            joined.insert(joined.end(), before.begin(), before.end());
            x[b][size_t(s)] = product(p + "eh_proj", joined);
        });
        attention(layer, k, x);
        mixture(layer, k, x, losses);
        losses.mtp += config.training.mtp_loss_weight / double(depth) * head(k, p + "shared_head.norm");
    }
    return losses;
}

}  // namespace moe::test
