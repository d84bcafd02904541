// Keys of the run around the training: top level, checkpoints, logging, profiling, distribution and launchers.
#include "core/config/schema.h"

namespace moe::reflect {
template <>
const Schema& schema<CheckpointingConfig>() {
    using C = CheckpointingConfig;
    static const Schema s("checkpointing", {
        field("enabled", &C::enabled).row("E1").help("Save checkpoints every training.save_interval steps."),
        field("dir", &C::dir).row("E1").help("Where: DIR/NAME/START TIME; null is checkpoints/ in the run's folder."),
        field("keep_last", &C::keep_last).min(1).unit("checkpoints").row("E1").help("Older ones are deleted, named ones never."),
        field("async", &C::async).row("E1").help("Write in the background while training goes on."),
        field("save_on_exit", &C::save_on_exit).row("E1").help("Save when the run ends, is interrupted or preempted, or the session that trained it is left (the last on one rank)."),
        field("format", &C::format).one_of({"native"}).row("E1").help("Layout of the files."),
    });
    return s;
}

template <>
const Schema& schema<StatisticsConfig>() {
    using C = StatisticsConfig;
    static const Schema s("statistics", {
        field("interval", &C::interval).min(1).unit("steps").row("G3").help("Steps between records of the experts' load."),
        field("matrices_interval", &C::matrices_interval).min(1).unit("steps").row("G3").help("Steps between co-activation and flow matrices."),
        field("saturation_lag", &C::saturation_lag).min(1).unit("steps").row("G3").help("Age of the copy with which today's choices of experts are compared."),
    });
    return s;
}

template <>
const Schema& schema<AlarmsConfig>() {
    using C = AlarmsConfig;
    static const Schema s("alarms", {
        field("max_vio", &C::max_vio).above(0).row("G3").help("Warn when the largest relative overload of a layer is above this; null never."),
        field("dead_steps", &C::dead_steps).min(1).unit("steps").row("G3").help("Warn when an expert got no token for this long."),
        field("spike_sigma", &C::spike_sigma).above(0).unit("standard deviations").row("G3").help("Warn when the loss jumps by this much."),
    });
    return s;
}

template <>
const Schema& schema<TensorboardConfig>() {
    using C = TensorboardConfig;
    static const Schema s("tensorboard", {
        field("enabled", &C::enabled).row("G2").help("Write TensorBoard event files (nothing is written yet: they come with monitoring)."),
        field("log_dir", &C::log_dir).row("G2").help("Where; null is tb/ in the run's folder."),
    });
    return s;
}

template <>
const Schema& schema<WandbConfig>() {
    using C = WandbConfig;
    static const Schema s("wandb", {
        field("enabled", &C::enabled).row("G2").help("Write a Weights & Biases offline run."),
        field("project", &C::project).row("G2").help("Project; null is experiment_name."),
        field("entity", &C::entity).row("G2").help("Team or user."),
        field("name", &C::name).row("G2").help("Name of the run."),
        field("tags", &C::tags).row("G2").help("Tags of the run."),
    });
    return s;
}

template <>
const Schema& schema<LoggingConfig>() {
    using C = LoggingConfig;
    static const Schema s("logging", {
        field("console", &C::console).row("G1").help("Print the log line."),
        field("statistics", &C::statistics).row("G3").help("How often routing is recorded."),
        field("alarms", &C::alarms).row("G3").help("When to warn."),
        field("tensorboard", &C::tensorboard).row("G2").help("TensorBoard event files."),
        field("wandb", &C::wandb).row("G2").help("Weights & Biases."),
        field("log_rank", &C::log_rank).min(0).row("G1").help("Rank that prints; null is the first of the last pipeline stage."),
    });
    return s;
}

template <>
const Schema& schema<ProfilingConfig>() {
    using C = ProfilingConfig;
    static const Schema s("profiling", {
        field("enabled", &C::enabled).alias("enable_profiling").alias("ENABLE_PROFILE").row("B10").help("Trace some steps to a file that a browser opens."),
        field("start", &C::start).min(0).unit("steps").row("B10").help("First traced step."),
        field("steps", &C::steps).min(1).unit("steps").row("B10").help("Traced steps."),
        field("profile_freq", &C::profile_freq).min(1).unit("steps").row("B10").help("Trace again every so many steps; null once."),
        field("folder", &C::folder).alias("save_traces_folder").row("B10").help("Folder of the traces in the run's folder."),
        field("memory_snapshot", &C::memory_snapshot).row("B10").help("Write what holds the device's memory, too."),
    });
    return s;
}

template <>
const Schema& schema<DistributedConfig>() {
    using C = DistributedConfig;
    static const Schema s("distributed", {
        field("backend", &C::backend).one_of({"nccl", "mpi", "deepspeed"}).row("D1").help("Library of the collectives on GPUs; deepspeed is nccl with the deepspeed section read."),
        field("launcher", &C::launcher).one_of({"local", "torchrun", "mpirun", "slurm", "deepspeed"}).row("D5").help("What starts the ranks."),
        field("tensor_parallel_size", &C::tensor_parallel_size).min(1).unit("ranks").row("D1").help("Ranks that share each layer's matrices."),
        field("pipeline_parallel_size", &C::pipeline_parallel_size).min(1).unit("ranks").row("D1").help("Stages that the layers are cut into."),
        field("expert_parallel_size", &C::expert_parallel_size).min(1).unit("ranks").row("D1").help("Ranks that the experts of a layer are spread over."),
        field("context_parallel_size", &C::context_parallel_size).min(1).unit("ranks").row("D1").help("Ranks that share each sequence."),
        field("data_parallel_size", &C::data_parallel_size).min(-1).unit("ranks").row("D1").help("Ranks with different sequences; -1 is what the number of ranks allows."),
        field("replicate_size", &C::replicate_size).min(1).unit("ranks").row("D1").help("Copies of the sharded state (hybrid sharding)."),
        field("expert_tensor_parallel_size", &C::expert_tensor_parallel_size).min(1).unit("ranks").row("D1").help("Ranks that share one expert's matrices."),
        field("zero_stage", &C::zero_stage).min(0).max(3).row("D2").help("What data-parallel ranks share out: 1 optimizer state, 2 gradients too, 3 weights too."),
        field("zero_offload", &C::zero_offload).row("D2").help("Keep the optimizer state in the host's memory."),
        field("overlap_grad_reduce", &C::overlap_grad_reduce).row("D2").help("Reduce gradients while backward goes on."),
        field("overlap_param_gather", &C::overlap_param_gather).row("D2").help("Gather weights while forward goes on."),
        field("reduce_bucket_bytes", &C::reduce_bucket_bytes).min(1).unit("bytes").row("D2").help("Size of one gradient reduction."),
        field("pipeline_schedule", &C::pipeline_schedule).one_of({"gpipe", "1f1b", "interleaved", "zero_bubble", "dualpipev"}).row("D1").help("Order of micro-batches over the stages."),
        field("pipeline_chunks", &C::pipeline_chunks).min(1).row("D1").help("Pieces of the model on each stage."),
        field("dispatcher", &C::dispatcher).one_of({"auto", "padded", "symmetric", "host_sized"}).row("D3").help("How tokens travel to their experts' ranks."),
        field("timeout_secs", &C::timeout_secs).alias("init_timeout_seconds").min(1).unit("seconds").row("D1").help("How long rank 0 waits for the other ranks' parts of a checkpoint before the save is an error."),
    });
    return s;
}

template <>
const Schema& schema<DeepspeedPrecision>() {
    using C = DeepspeedPrecision;
    static const Schema s("precision", {field("enabled", &C::enabled).row("D2").help("Same as training.use_fp16 or use_bf16.")});
    return s;
}

template <>
const Schema& schema<DeepspeedOffload>() {
    using C = DeepspeedOffload;
    static const Schema s("offload", {field("device", &C::device).one_of({"none", "cpu", "nvme"}).row("D2").help("Where the state is kept; same as distributed.zero_offload.")});
    return s;
}

template <>
const Schema& schema<DeepspeedZero>() {
    using C = DeepspeedZero;
    static const Schema s("zero_optimization", {
        field("stage", &C::stage).min(0).max(3).row("D2").help("Same as distributed.zero_stage."),
        field("offload_optimizer", &C::offload_optimizer).row("D2").help("Offload of the optimizer state."),
        field("offload_param", &C::offload_param).row("D2").help("Offload of the weights."),
        field("overlap_comm", &C::overlap_comm).row("D2").help("Same as distributed.overlap_grad_reduce."),
        field("contiguous_gradients", &C::contiguous_gradients).row("D2").help("Always so here."),
        field("reduce_bucket_size", &C::reduce_bucket_size).min(1).unit("elements").row("D2").help("Size of one gradient reduction; distributed.reduce_bucket_bytes in elements."),
    });
    return s;
}

template <>
const Schema& schema<DeepspeedConfig>() {
    using C = DeepspeedConfig;
    static const Schema s("deepspeed", {
        field("enabled", &C::enabled).row("D2").help("Read this section: its values are translated into training and distributed."),
        field("config_file", &C::config_file).row("D2").help("A DeepSpeed JSON file to read as well."),
        field("fp16", &C::fp16).row("D2").help("float16."),
        field("bf16", &C::bf16).row("D2").help("bfloat16."),
        field("zero_optimization", &C::zero_optimization).row("D2").help("ZeRO."),
        field("gradient_accumulation_steps", &C::gradient_accumulation_steps).min(1).unit("micro-batches").row("D2").help("Must agree with the batch sizes of training."),
        field("gradient_clipping", &C::gradient_clipping).min(0).row("D2").help("Same as training.grad_clip."),
    });
    return s;
}

template <>
const Schema& schema<SlurmConfig>() {
    using C = SlurmConfig;
    static const Schema s("slurm", {
        field("enabled", &C::enabled).row("D6").help("Submit the run as a Slurm job."),
        field("partition", &C::partition).row("D6").help("Partition."),
        field("nodes", &C::nodes).min(1).row("D6").help("Nodes."),
        field("ntasks_per_node", &C::ntasks_per_node).min(1).row("D6").help("Ranks a node."),
        field("gpus_per_node", &C::gpus_per_node).min(0).row("D6").help("GPUs a node."),
        field("cpus_per_task", &C::cpus_per_task).min(1).row("D6").help("Processor cores a rank."),
        field("time", &C::time).row("D6").help("Time limit, e.g. 24:00:00."),
        field("mem", &C::mem).row("D6").help("Memory a node, e.g. 64G."),
        field("job_name", &C::job_name).row("D6").help("Name of the job; null is experiment_name."),
        field("output", &C::output).row("D6").help("File of standard output; %j is the job's number."),
        field("error", &C::error).row("D6").help("File of standard error."),
        field("account", &C::account).row("D6").help("Account that pays."),
        field("qos", &C::qos).row("D6").help("Quality of service."),
        field("extra_args", &C::extra_args).row("D6").help("More options of sbatch, one text each."),
        field("container_image", &C::container_image).row("D6").help("Container to run in."),
        field("container_mounts", &C::container_mounts).row("D6").help("Folders seen inside the container, as host:container."),
        field("requeue", &C::requeue).row("D6").help("A preempted job is queued again and resumes."),
        field("signal_secs", &C::signal_secs).min(0).unit("seconds").row("D6").help("Warning before the time limit, for a last checkpoint."),
    });
    return s;
}

template <>
const Schema& schema<Config>() {
    using C = Config;
    static const Schema s("config", {
        field("experiment_name", &C::experiment_name).row("G4").help("Name of the experiment and of its folder in output_dir."),
        field("output_dir", &C::output_dir).row("G4").help("Where runs are kept, as <output_dir>/<name>/<start time>/."),
        field("seed", &C::seed).min(0).row("B5").help("Seed of initial weights, dropout, noise and sampling."),
        field("inherits", &C::inherits).row("H3").help("File or ready name that this file changes; its keys are merged under this file's. Relative to this file."),
        field("device", &C::device).one_of({"cpu", "cuda"}).row("H3").help("Where to compute; null is cuda when there is a GPU for every rank."),
        field("deterministic", &C::deterministic).row("B5").help("The same run twice gives the same bits, a little slower."),
        field("model", &C::model).row("A8").help("The network."),
        field("training", &C::training).row("B1").help("Batches, optimizer, schedule, precision."),
        field("data", &C::data).row("C2").help("What is trained on."),
        field("validation", &C::validation).row("B8").help("What is validated on."),
        field("checkpointing", &C::checkpointing).row("E1").help("Saved states."),
        field("logging", &C::logging).row("G1").help("Log line, statistics, alarms."),
        field("profiling", &C::profiling).row("B10").help("Traces of time and memory."),
        field("distributed", &C::distributed).row("D1").help("Ranks and how they share the work."),
        field("deepspeed", &C::deepspeed).row("D2").help("A DeepSpeed user's settings."),
        field("slurm", &C::slurm).row("D6").help("The cluster job."),
    });
    return s;
}
}  // namespace moe::reflect
