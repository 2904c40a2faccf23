"""The same training by another way in must be the same training."""

import json

import pytest
import support
from support import SGD, assert_same_weights, distil, train_on_two_ranks, train_plain


def test_kd_weight_0_is_stock_training(data, teacher, tmp_path):
    """With dropout: the teacher must not touch the random numbers either."""
    options = (*SGD, "--dropout", 0.1, "--max-update", 60, "--report-accuracy")
    stock = train_plain(data, tmp_path / "stock", *options).ok()
    ours = distil(data, teacher, tmp_path / "ours", *options, "--kd-weight", 0).ok()

    assert len(stock.records("train_inner")) == 60
    for tag, prefix in (("train_inner", ""), ("train", "train_"), ("valid", "valid_")):
        for key in ("loss", "nll_loss", "ppl", "accuracy", "n_correct", "total"):
            there, here = stock.series(tag, prefix + key), ours.series(tag, prefix + key)
            assert here == pytest.approx(there, abs=0.011), (tag, key)
    assert ours.series("train_inner", "gnorm") == pytest.approx(
        stock.series("train_inner", "gnorm"), abs=0.0011
    )
    assert_same_weights(
        *(tmp_path / "ours/checkpoint_last.pt", tmp_path / "stock/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )


def test_two_ranks_are_one_rank_with_two_batches_per_update(data, teacher, tmp_path):
    """Also with an odd number of batches, where one rank gets a dummy batch, in both passes;
    with what is learnt from the inside of the teacher."""
    options = (
        *SGD,
        *("--max-epoch", 2, "--report-accuracy", "--ddp-backend", "legacy_ddp"),
        # 31 training batches and 7 validation batches
        *("--max-sentences", 21, "--max-sentences-valid", 7),
        *("--kd-hidden", "relations", "--kd-attention-weight", 0.5),
    )
    one = distil(data, teacher, tmp_path / "one", *options, "--update-freq", 2).ok()

    two, _ = train_on_two_ranks(*support.kd_arguments(data, teacher, tmp_path / "two", *options))

    assert len(one.records("train_inner")) == 32
    keys = ("loss", "nll_loss", "kd_loss", "teacher_nll_loss", "agreement", "accuracy")
    for tag, prefix in (("train_inner", ""), ("train", "train_"), ("valid", "valid_")):
        for key in (*keys, "kd_hidden", "kd_attention"):
            there, here = one.series(tag, prefix + key), two.series(tag, prefix + key)
            assert len(there) >= 2
            assert here == pytest.approx(there, abs=0.0021), (tag, key)
    assert two.series("train_inner", "gnorm") == pytest.approx(
        one.series("train_inner", "gnorm"), abs=0.0011
    )
    assert_same_weights(
        *(tmp_path / "one/checkpoint_last.pt", tmp_path / "two/checkpoint_last.pt"),
        rtol=1e-3,
        atol=1e-5,
    )


YAML = """# @package _group_
common: {{user_dir: {user_dir}, cpu: true, seed: 3, log_format: json, log_interval: 1}}
task:
  _name: kd_translation
  data: {data}
  source_lang: aa
  target_lang: bb
  teacher_checkpoint_path: {teacher}
criterion:
  _name: kd_label_smoothed_cross_entropy
  label_smoothing: 0.1
  report_accuracy: true
  kd_weight: 0.7
  ce_weight: 0.6
  kd_temperature: 2.0
model:
  _name: transformer
  base_layers: 0  # fairseq 0.12.2 leaves it null, and cannot save then
  dropout: 0.0
  share_decoder_input_output_embed: true
  encoder: {{embed_dim: 16, ffn_embed_dim: 32, layers: 1, attention_heads: 2}}
  decoder: {{embed_dim: 16, ffn_embed_dim: 32, layers: 1, attention_heads: 2}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
dataset:
  batch_size: 16
  required_batch_size_multiple: 1
  num_workers: 0
  ignore_unused_valid_subsets: true
optimization: {{lr: [0.005], max_update: 45}}
checkpoint: {{save_dir: {save_dir}, no_epoch_checkpoints: true}}
"""


def test_yaml_is_the_command_line(data, teacher, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tiny.yaml").write_text(
        YAML.format(user_dir=support.PLUGIN, data=data, teacher=teacher, save_dir=tmp_path / "yaml")
    )
    by_yaml = support.script(
        *("fairseq-hydra-train", "--config-dir", tmp_path / "config", "--config-name", "tiny"),
        cwd=tmp_path,
    ).ok()
    by_flags = distil(
        *(data, teacher, tmp_path / "flags", "--max-update", 45, "--report-accuracy"),
        *("--kd-weight", 0.7, "--ce-weight", 0.6, "--kd-temperature", 2.0),
    ).ok()

    # Hydra's logging has another format
    found = [
        json.loads(line[line.index("{") :])
        for line in by_yaml.text.splitlines()
        if "[train_inner]" in line
    ]
    assert len(found) == 45
    for key in ("loss", "nll_loss", "kd_loss", "agreement"):
        assert [float(r[key]) for r in found] == by_flags.series("train_inner", key), key
    assert_same_weights(tmp_path / "yaml/checkpoint_last.pt", tmp_path / "flags/checkpoint_last.pt")


def test_the_shipped_yaml_runs(data, teacher, tmp_path):
    """With nothing but paths, languages and the toy's sizes changed."""
    run = support.script(
        *("fairseq-hydra-train", "--config-dir", support.CHECKOUT / "recipes" / "config"),
        *("--config-name", "kd_translation", f"common.user_dir={support.PLUGIN}"),
        *("common.cpu=true", f"task.data={data}"),
        *("task.source_lang=aa", "task.target_lang=bb"),
        f"task.teacher_checkpoint_path={teacher}",
        *("model.encoder.embed_dim=16", "model.decoder.embed_dim=16"),
        *("model.share_all_embeddings=false", "dataset.ignore_unused_valid_subsets=true"),
        *("optimization.max_update=3", "common.log_format=json", "common.log_interval=1"),
        cwd=tmp_path,
    ).ok()

    assert run.text.count("[train_inner]") == 3
    assert "valid_kd_loss" in run.text
    assert list(tmp_path.glob("outputs/*/*/checkpoints/checkpoint_best.pt"))


def test_ensemble_of_one_teacher_twice_is_that_teacher(data, teacher, tmp_path, distilled):
    both = distil(data, "{0}:{0}".format(teacher), tmp_path, "--max-update", 40).ok()
    alone = distilled.run.series("train_inner", "kd_loss")[:40]
    assert both.series("train_inner", "kd_loss") == pytest.approx(alone, abs=0.0021)
