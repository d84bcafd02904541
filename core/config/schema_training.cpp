// Keys of training, data and validation.
#include "core/config/schema.h"

namespace moe::reflect {
template <>
const Schema& schema<SftConfig>() {
    using C = SftConfig;
    static const Schema s("sft", {
        field("chat_template", &C::chat_template).row("B7").help("Template that turns messages into text, or a file with one; null takes the tokenizer's."),
        field("loss_on", &C::loss_on).one_of({"answers", "all"}).row("B7").help("Which tokens are trained on."),
        field("packing", &C::packing).row("B7").help("Several conversations share a sequence, none seeing another."),
    });
    return s;
}

template <>
const Schema& schema<LoraConfig>() {
    using C = LoraConfig;
    static const Schema s("lora", {
        field("rank", &C::rank).min(1).row("B7").help("Rank of the low-rank updates; null trains the weights themselves."),
        field("alpha", &C::alpha).above(0).row("B7").help("The update is multiplied by alpha / rank."),
        field("targets", &C::targets).row("B7").help("Patterns of the weights that get an update; empty takes all projections."),
    });
    return s;
}

template <>
const Schema& schema<DpoConfig>() {
    using C = DpoConfig;
    static const Schema s("dpo", {field("beta", &C::beta).above(0).row("B7").help("Strength of the pull towards the reference model.")});
    return s;
}

template <>
const Schema& schema<BatchSizeRamp>() {
    using C = BatchSizeRamp;
    static const Schema s("batch_size_ramp", {
        field("start", &C::start).min(1).unit("sequences").row("B3").help("Global batch of the first step."),
        field("tokens", &C::tokens).min(0).unit("tokens").row("B3").help("Tokens after which it is global_batch_size."),
    });
    return s;
}

template <>
const Schema& schema<TrainingConfig>() {
    using C = TrainingConfig;
    static const Schema s("training", {
        field("global_batch_size", &C::global_batch_size).min(1).unit("sequences").row("B1").help("Sequences of one optimizer step over all ranks."),
        field("micro_batch_size", &C::micro_batch_size).min(1).unit("sequences").row("B1").help("Sequences that a rank computes at once; lower it when memory runs out."),
        field("seq_length", &C::seq_length).min(1).unit("tokens").row("B1").help("Tokens of a sequence."),
        field("train_steps", &C::train_steps).min(1).unit("steps").row("B1").help("Length of the run; goes before the two keys below."),
        field("total_training_tokens", &C::total_training_tokens).min(1).unit("tokens").row("B1").help("Length of the run where train_steps is null."),
        field("tokens_per_parameter_ratio", &C::tokens_per_parameter_ratio).above(0).unit("tokens a parameter").row("B1").help("Length of the run, times all parameters, where both keys above are null; 20 is Chinchilla's."),
        field("learning_rate", &C::learning_rate).alias("lr").min(0).row("B3").help("Peak learning rate."),
        field("min_learning_rate", &C::min_learning_rate).min(0).row("B3").help("Learning rate at the end of the decay."),
        field("lr_warmup_steps", &C::lr_warmup_steps).min(0).unit("steps").row("B3").help("Steps of linear rise from 0 to learning_rate."),
        field("lr_decay_style", &C::lr_decay_style).one_of({"cosine", "linear", "constant", "wsd", "deepseek_v3"}).row("B3").help("Shape of the decay after the warm-up."),
        field("lr_decay_ratio", &C::lr_decay_ratio).above(0).max(1).row("B3").help("Share of the run that decays (cosine, linear, wsd); null is all of it after the warm-up, for wsd 0.1."),
        field("weight_decay", &C::weight_decay).min(0).row("B2").help("Weight decay, decoupled for adamw and muon, added to the gradient for adam and sgd; never on norms and biases."),
        field("grad_clip", &C::grad_clip).min(0).row("B2").help("Largest norm of the whole gradient; 0 does not clip."),
        field("optimizer", &C::optimizer).one_of({"adamw", "adam", "sgd", "muon"}).row("B2").help("Update rule; muon moves hidden matrices by Muon, everything else by AdamW."),
        field("adam_beta1", &C::adam_beta1).min(0).below(1).row("B2").help("Decay of the first moment."),
        field("adam_beta2", &C::adam_beta2).min(0).below(1).row("B2").help("Decay of the second moment."),
        field("adam_eps", &C::adam_eps).above(0).row("B2").help("Added to the root of the second moment."),
        field("momentum", &C::momentum).min(0).below(1).row("B2").help("Momentum of sgd (0 keeps no state) and muon."),
        field("moments_dtype", &C::moments_dtype).one_of({"fp32", "bf16"}).row("B2").help("Precision in which moments are stored; arithmetic stays in fp32, stores are rounded to nearest."),
        field("grads_dtype", &C::grads_dtype).one_of({"fp32", "bf16"}).row("B2").help("Precision in which gradients accumulate; every sum is made in fp32 and rounded."),
        field("use_fp64", &C::use_fp64).row("B4").help("Everything in float64: for tests."),
        field("use_fp16", &C::use_fp16).row("B4").help("float16 products with a dynamic loss scale."),
        field("use_bf16", &C::use_bf16).row("B4").help("bfloat16 products over fp32 master weights."),
        field("use_fp8", &C::use_fp8).row("B4").help("E4M3 products, 1×128 activations and 128×128 weights, over fp32 master weights."),
        field("gradient_checkpointing", &C::gradient_checkpointing).one_of({"none", "selective", "full"}).flag_words("full", "none").row("B4").help("What is computed again in backward instead of kept: nothing, the segments that recompute names (without names as few as memory asks for), or every layer but its input; true is full."),
        field("recompute", &C::recompute).row("B4").help("Segments that selective checkpointing computes again: kinds (attention, feed_forward, route, dispatch, experts, shared_experts, combine) or names (layers.3.experts); empty: those that free most for what they cost, as few as this device's memory asks for."),
        field("use_mtp", &C::use_mtp).row("A7").help("Multi-token prediction: extra modules predict the tokens after the next."),
        field("num_predict_tokens", &C::num_predict_tokens).alias("mtp_tokens").min(1).unit("tokens").row("A7").help("Tokens predicted at each position with use_mtp: the MTP depth plus 1."),
        field("mtp_loss_weight", &C::mtp_loss_weight).min(0).row("A7").help("Weight of the mean MTP loss."),
        field("batch_size_ramp", &C::batch_size_ramp).row("B3").help("Start with a smaller global batch; null does not."),
        field("dynamic_batch_tokens", &C::dynamic_batch_tokens).min(1).unit("tokens").row("B3").help("A step takes as many sequences as hold this many tokens without padding, instead of global_batch_size."),
        field("eval_interval", &C::eval_interval).min(1).unit("steps").row("B8").help("Steps between validations."),
        field("save_interval", &C::save_interval).min(1).unit("steps").row("E1").help("Steps between checkpoints."),
        field("log_interval", &C::log_interval).min(1).unit("steps").row("G1").help("Steps between log lines; logging.log_interval is the same key."),
        field("init_from", &C::init_from).row("B6").help("Checkpoint folder whose weights the run starts from."),
        field("max_skipped_steps", &C::max_skipped_steps).min(1).unit("steps").row("B5").help("Steps in a row with a non-finite loss or gradient after which the run stops."),
        field("compile_graphs", &C::compile_graphs).one_of({"auto", "on", "off"}).flag_words("on", "off").row("B4").help("Replay a step as CUDA graphs; auto does where launches cost time."),
        field("sft", &C::sft).row("B7").help("Supervised fine-tuning on chat data."),
        field("lora", &C::lora).row("B7").help("Low-rank fine-tuning."),
        field("dpo", &C::dpo).row("B7").help("Direct preference optimisation."),
    });
    return s;
}

template <>
const Schema& schema<PreprocessingConfig>() {
    using C = PreprocessingConfig;
    static const Schema s("preprocessing", {
        field("num_workers", &C::num_workers).min(0).unit("threads").row("C2").help("Threads that read and tokenize ahead, 0: none; the data do not depend on it."),
        field("shuffle", &C::shuffle).row("C2").help("Documents in random order."),
        field("shuffle_seed", &C::shuffle_seed).row("C2").help("Seed of that order."),
    });
    return s;
}

template <>
const Schema& schema<DataSource>() {
    using C = DataSource;
    static const Schema s("source", {
        field("name", &C::name).row("C1").help("Name of the source, and of its domain in every table."),
        field("subset", &C::subset).row("C1").help("Subset of the data set, e.g. dolma_v1_6_c4."),
        field("path", &C::path).row("C1").help("File or folder; null is the subset or the name below data.path, else below data.cache_dir."),
        field("weight", &C::weight).min(0).row("C1").help("Share of tokens; weights are normalised over the sources."),
        field("description", &C::description).row("C1").help("For people."),
    });
    return s;
}

template <>
const Schema& schema<SyntheticConfig>() {
    using C = SyntheticConfig;
    static const Schema s("synthetic", {
        field("domains", &C::domains).min(1).row("C2").help("Domains with different statistics."),
        field("seed", &C::seed).row("C2").help("Seed of the made-up languages."),
    });
    return s;
}

template <>
const Schema& schema<DataConfig>() {
    using C = DataConfig;
    static const Schema s("data", {
        field("dataset_name", &C::dataset_name).row("C1").help("Name of the data set, e.g. allenai/dolma; a saved position holds for this name only."),
        field("dataset_version", &C::dataset_version).row("C1").help("Version of the data set, e.g. v1_6; a saved position holds for this version only."),
        field("dataset_type", &C::dataset_type).one_of({"synthetic", "text", "jsonl", "tokens", "parquet", "hf", "local_corpus"}).row("C2").help("Kind of data: made up, text files, JSON lines (.jsonl, .gz, .zst), token shards (.npy, .bin), parquet, a Hugging Face folder, or text found on this machine (read as text)."),
        field("path", &C::path).row("C2").help("File or folder of the data; each subfolder is a domain."),
        field("cache_dir", &C::cache_dir).row("C1").help("Where downloaded data, indices of documents and encoded copies are kept."),
        field("tokenizer", &C::tokenizer).row("C3").help("\"bytes\", or a tokenizer's file or folder."),
        field("preprocessing", &C::preprocessing).row("C2").help("Workers and order."),
        field("sources", &C::sources).row("C1").help("The mixture; empty takes the subfolders of path, weighted by their tokens."),
        field("text_field", &C::text_field).row("C2").help("Key of the text in JSON lines and parquet; dots lead into objects."),
        field("packing", &C::packing).row("C4").help("Several documents share a sequence; false pads each."),
        field("document_mask", &C::document_mask).row("C4").help("Packed documents do not see each other."),
        field("fim_rate", &C::fim_rate).min(0).max(1).row("C4").help("Share of documents rearranged as prefix, suffix, middle."),
        field("bad_lines", &C::bad_lines).one_of({"error", "skip"}).row("C2").help("What an unreadable line does; skipped lines are counted."),
        field("synthetic", &C::synthetic).row("C2").help("Made-up data."),
    });
    return s;
}

template <>
const Schema& schema<ValidationConfig>() {
    using C = ValidationConfig;
    static const Schema s("validation", {
        field("enabled", &C::enabled).row("B8").help("Compute the validation loss every training.eval_interval steps."),
        field("sources", &C::sources).row("B8").help("Sources, as data.sources."),
        field("path", &C::path).row("B8").help("Data, as data.path; for synthetic data a held-out part is made."),
        field("max_batches", &C::max_batches).min(1).unit("micro-batches").row("B8").help("How much is read each time."),
        field("by_domain", &C::by_domain).row("B8").help("Report every domain's loss, too."),
    });
    return s;
}
}  // namespace moe::reflect
