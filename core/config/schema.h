// The field lists of the configuration, one specialisation a section. A key is added in two places: a member in config.h and a
// line in the section's list in schema_*.cpp.
#pragma once
#include "core/base/reflect.h"
#include "core/config/config.h"

namespace moe::reflect {

// clang-format off
template <> const Schema& schema<RopeScaling>();
template <> const Schema& schema<MlaConfig>();
template <> const Schema& schema<MoeConfig>();
template <> const Schema& schema<ModelConfig>();
template <> const Schema& schema<SftConfig>();
template <> const Schema& schema<LoraConfig>();
template <> const Schema& schema<DpoConfig>();
template <> const Schema& schema<BatchSizeRamp>();
template <> const Schema& schema<TrainingConfig>();
template <> const Schema& schema<PreprocessingConfig>();
template <> const Schema& schema<DataSource>();
template <> const Schema& schema<SyntheticConfig>();
template <> const Schema& schema<DataConfig>();
template <> const Schema& schema<ValidationConfig>();
template <> const Schema& schema<CheckpointingConfig>();
template <> const Schema& schema<StatisticsConfig>();
template <> const Schema& schema<AlarmsConfig>();
template <> const Schema& schema<TensorboardConfig>();
template <> const Schema& schema<WandbConfig>();
template <> const Schema& schema<LoggingConfig>();
template <> const Schema& schema<ProfilingConfig>();
template <> const Schema& schema<DistributedConfig>();
template <> const Schema& schema<DeepspeedPrecision>();
template <> const Schema& schema<DeepspeedOffload>();
template <> const Schema& schema<DeepspeedZero>();
template <> const Schema& schema<DeepspeedConfig>();
template <> const Schema& schema<SlurmConfig>();
template <> const Schema& schema<Config>();
// clang-format on

}  // namespace moe::reflect
