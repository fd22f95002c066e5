"""Mistakes in rollouts of reinforcement learning: prompts, groups, what is kept between updates, and arguments."""

from mutant import of

COLLECTED = ("tests/unit/rl/test_collecting.py",)
ARGUMENTS = ("tests/unit/arguments/test_grpo_arguments.py",)
PLOTTED = ("tests/unit/cli/test_plot_rewards.py",)
REFRESHED = ("tests/unit/rl/test_refreshed_reference.py",)
ADAPTED = ("tests/e2e/test_grpo_options.py::test_adapters_are_measured_by_their_base",)
KILLED = ("tests/e2e/test_grpo.py",)

REINFORCED = of(
    COLLECTED,
    ("PromptOrder.places", "default_rng((self.seed, epoch))", "default_rng(self.seed)"),
    ("prompts.PromptReader._ids", "[self.settings.prompt_column] if self.settings.prompt_column else _COLUMNS",
     "_COLUMNS"),
    ("prompts._conversation", 'turns[-1].role == "assistant"', "False"),
    ("prompts.read_prompts", "data.seq_length - longest_completion", "data.seq_length"),
    ("Collector.collect", "self.rollout.prompts - found.num_groups", "self.rollout.prompts"),
    ("Collector.collect", "found.rounds < (self.rounds or 1)", "found.rounds < (self.rounds or 2)"),
    ("Collector._round", "self.source.take(begin + asked, groups)", "self.source.take(begin, groups)"),
    ("Collector._round", "seed_of(self.seed, number, asked + place)", "seed_of(self.seed, 0, asked + place)"),
    ("Collector._round", "unrewarded if self.rounds is None else unrewarded | even", "unrewarded"),
    ("Collector._round", "verdict.of(kept)", "verdict"),
    ("Collector._useless", "{*groups} - rewarded", "set()"),
    ("overlong_penalty", "longest - buffer - length", "longest - length"),
    ("maker.divide", "settings.run.seed, number, each_pass", "settings.run.seed, number"),
    ("Rollout.is_over", "iteration >= self.iteration", "iteration > self.iteration"),
    ("Records.__init__", "int(match[1]) > iteration", "int(match[1]) >= iteration"),
    ("measures._rewards", "fmean(spreads or [0.0])", "pstdev(spreads or [0.0])"),
) + of(
    ARGUMENTS,
    ("Request.updates_per_rollout", "self.rollout_samples * self.args.grpo_iterations", "self.rollout_samples"),
    ("Request.batch", "self.rollout_samples if self.reinforces else self._row", "self._row"),
    ("_reward_error", "r.args.reward or ()", "r.args.reward"),
    ("GrpoParser.describe_unknown", "if name not in KINDS:", "if name:"),
    ("grpo_settings", "constant if args.loss_aggregation == CONSTANT else None", "args.loss_constant"),
) + of(
    PLOTTED,
    ("plot_rewards.read_reward_curves", '"mean_completion" in record', '"iteration" in record'),
) + of(
    REFRESHED,
    ("Reference.checkpoint_begins", "self._begun_save = iteration", "pass"),
    ("RolloutMaker.make", "self._iteration = state.iteration + 1", "self._iteration = state.iteration"),
    ("RolloutMaker.keep", "self.reference.checkpoint_begins(self._iteration)", "pass"),
) + of(
    ADAPTED,
    ("RolloutMaker._scored", "with self.reference.in_trainer():", "with torch.enable_grad():"),
) + of(
    KILLED,
    ("HeldWeights.exchange", "held.copy_(before)", "pass"),
    ("Reference._begun", "iteration // self.interval * self.interval or None", "None"),
    ("RolloutMaker._scored", "len(rollout.updates) > 1", "False"),
)
