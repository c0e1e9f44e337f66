//! What a decode step has a GPU do, counted on a device that computes nothing.

use sterna::backend::gpu::account::{Account, DryRun, DryRunOptions, Part, dry_check, dry_run};
use sterna::backend::gpu::{Capabilities, GemvPlan, Variant};
use sterna::backend::{HeadChoice, LoadOptions};
use sterna::config::ModelConfig;
use sterna::synthetic::{Shapes, published};
use sterna::tensor_names::LINEARS;

fn options() -> DryRunOptions {
    DryRunOptions {
        plan: GemvPlan::from(Variant::PackedDot),
        capabilities: Capabilities::Adapter,
        n_prompt: 64,
        n_decode: 4,
        load: LoadOptions { context: Some(128), ..LoadOptions::default() },
    }
}

fn count(config: ModelConfig, options: &DryRunOptions) -> DryRun {
    dry_run(&Shapes::new(config), options, &mut |_| {}).expect("a dry run")
}

fn shape(name: &str) -> ModelConfig {
    published(name).expect("a published shape")
}

/// Weights of a layer's matrices.
fn weights_a_layer(config: &ModelConfig) -> usize {
    LINEARS.iter().map(|linear| (linear.shape)(config)).map(|(n, k)| n * k).sum()
}

#[track_caller]
fn assert_within(what: &str, found: u64, expected: f64, share: f64) {
    let off = (found as f64 / expected - 1.0).abs();
    assert!(off <= share, "{what}: {found}, expected {expected} within {share}");
}

#[test]
fn a_decode_step_is_few_dispatches_a_layer_in_one_submit() {
    for name in ["bitnet-large", "falcon3-1b", "falcon-e-1b", "bitnet-3b", "llama3-8b"] {
        for variant in Variant::ALL {
            let config = shape(name);
            let layers = config.num_hidden_layers as u64;
            let plan = GemvPlan::from(variant);
            // Heads of 100 values, whose pairs do not meet in a tile: `qkv` is five.
            let qkv = if config.head_dim.is_multiple_of(32) { 1 } else { 5 };
            // Past the longest row of the fused kernels `down` is three, and four with a norm.
            let is_fused = config.intermediate_size <= plan.max_fused_k();
            let norm = u64::from(config.has_sub_norms());
            let a_layer = 3 + qkv + if is_fused { 1 } else { 3 + norm };
            let DryRun { decode, .. } = count(config.clone(), &DryRunOptions { plan, ..options() });
            let (total, n) = (decode.total(), decode.n_tokens);
            let layer_steps = decode.sum(Part::is_of_layers);
            assert_eq!(layer_steps.dispatches, n * layers * a_layer, "{name}");
            assert_eq!(total.dispatches, n * (layers * a_layer + 5), "{name}");
            assert_eq!((total.passes, total.submits), (n, n), "{name}");
            assert_eq!(total.readback_bytes, 8 * n, "{name}");
            // Two bits a weight, and a little for each row.
            let expected = weights_a_layer(&config) as f64 / 4.0 * (n * layers) as f64;
            assert_within(name, layer_steps.weight_bytes, expected, 0.03);
            // Tiles of int8 rows with their scale and bounds, and the norm.
            let (rows, k) = (config.vocab_size.next_multiple_of(32), config.hidden_size);
            let head = rows * (k.next_multiple_of(128) + 16) + 4 * k;
            assert_eq!(decode.part(Part::Head).weight_bytes, head as u64 * n, "{name}");
            // Of the exact table the row that wins.
            let row = config.hidden_size as u64 * 2 * n;
            assert_eq!(decode.part(Part::Choose).weight_bytes, row, "{name}");
            assert_eq!(decode.part(Part::Embed).weight_bytes, row, "{name}");
        }
    }
}

#[test]
fn a_token_reads_the_cache_up_to_itself() {
    let config = shape("bitnet-large");
    let DryRun { decode, prompt, .. } = count(config.clone(), &options());
    let position = 2 * config.kv_size() as u64 * 4 * config.num_hidden_layers as u64;
    // Tokens 64 to 67, each with itself.
    assert_eq!(decode.total().cache_bytes, position * (65 + 66 + 67 + 68));
    assert_eq!(prompt.total().cache_bytes, position * 64);
    assert_eq!((prompt.total().submits, prompt.total().readback_bytes), (1, 8));
}

#[test]
fn a_draft_reads_the_weights_once() {
    for (name, head) in [
        ("bitnet-large", HeadChoice::Int8),
        ("bitnet-large", HeadChoice::Exact),
        ("falcon3-1b", HeadChoice::Int8),
    ] {
        let config = shape(name);
        let load = LoadOptions { head, ..options().load };
        let options = DryRunOptions { load, ..options() };
        let check = |n| dry_check(&Shapes::new(config.clone()), &options, n).expect("a dry run");
        let one = check(1);
        let row = config.hidden_size as u64 * 2;
        for n in 2..=8 {
            let draft = check(n);
            let (n, what) = (n as u64, format!("{name} {head:?}, {n} tokens"));
            let weights = |part| (draft.part(part).weight_bytes, one.part(part).weight_bytes);
            for part in
                [Part::Qkv, Part::Attend, Part::ProjectOut, Part::GateUp, Part::Down, Part::Head]
            {
                let (draft, one) = weights(part);
                assert_eq!(draft, one, "{what}: {part:?}");
            }
            // A row of each token, and of the exact table the row that wins.
            assert_eq!(draft.part(Part::Embed).weight_bytes, n * row, "{what}");
            let chosen = if head == HeadChoice::Int8 { n * row } else { 0 };
            assert_eq!(draft.part(Part::Choose).weight_bytes, chosen, "{what}");
            let (found, expected) = (draft.total(), one.total());
            assert_eq!((found.passes, found.submits), (1, 1), "{what}");
            assert_eq!(found.readback_bytes, 8 * n, "{what}");
            // Its logits are computed together.
            let head = |account: &Account| account.part(Part::Head).dispatches;
            assert_eq!(head(&draft), head(&one), "{what}");
            assert!(found.weight_bytes - expected.weight_bytes <= 2 * (n - 1) * row, "{what}");
        }
    }
}

#[test]
fn scales_of_groups_are_counted() {
    for (name, bits) in [("bonsai-1.7b", 1.0), ("ternary-bonsai-1.7b", 2.0)] {
        let config = ModelConfig { vocab_size: 4096, ..shape(name) };
        let layers = config.num_hidden_layers as u64;
        let DryRun { decode, head, .. } = count(config.clone(), &options());
        let (total, n) = (decode.total(), decode.n_tokens);
        assert_eq!((total.passes, total.submits, total.readback_bytes), (n, n, 8 * n), "{name}");
        // A half-precision scale for every 128 weights.
        let bytes = (bits + 16.0 / 128.0) / 8.0;
        let expected = weights_a_layer(&config) as f64 * bytes * (n * layers) as f64;
        assert_within(name, decode.sum(Part::is_of_layers).weight_bytes, expected, 0.03);
        let table = (4096 * config.hidden_size) as f64 * bytes;
        assert_within(name, decode.part(Part::Head).weight_bytes, table * n as f64, 0.03);
        assert_within(name, decode.part(Part::Embed).weight_bytes, table / 4096.0 * n as f64, 0.03);
        assert_eq!(head, "packed", "{name}");
    }
}

#[test]
fn shards_read_the_same_weights_in_more_dispatches() {
    let config = shape("bitnet-2b4t");
    let whole = count(config.clone(), &options()).decode;
    let capabilities = Capabilities::WebGpuDefault;
    let shards = count(config, &DryRunOptions { capabilities, ..options() }).decode;
    let [whole_head, head] = [&whole, &shards].map(|account| account.part(Part::Head));
    assert_eq!(whole_head.weight_bytes, head.weight_bytes);
    assert_eq!(whole_head.bytes_written, head.bytes_written);
    // 330 MB in bindings of 128 MiB.
    assert_eq!((whole_head.dispatches, head.dispatches), (2 * 4, (1 + 3) * 4));
}

#[cfg(feature = "cli")]
mod program {
    use crate::cli::{failure, json, stdout, sterna};

    const DRY_RUN: &str = "bench --dry-run --device gpu --synthetic bitnet-2b4t";

    #[test]
    fn bitnet_2b4t() {
        let report = json(sterna(&format!("{DRY_RUN} --json")));
        let decode = report["decode"].as_object().unwrap();
        let number = |key: &str| decode[key].as_f64().unwrap();
        assert!(number("dispatches_per_layer") <= 6.0, "{report}");
        assert_eq!(number("passes_per_token"), 1.0, "{report}");
        assert!(number("submits_per_token") <= 1.0, "{report}");
        assert!(number("readback_bytes_per_token") <= 16.0, "{report}");
        assert!(number("dispatches_per_token") <= 6.0 * 30.0 + 8.0, "{report}");
        // Activations, and one row of logits.
        assert!(number("bytes_written_per_token") < 4e6, "{report}");
        let by = |key: &str| report["weight_bytes_by"][key].as_f64().unwrap();
        // 2 084 044 800 weights of two bits.
        assert!((by("layers") / 521.0e6 - 1.0).abs() < 0.03, "{report}");
        // A byte for each of 128,256 · 2560 weights.
        assert!((by("head") / 328.3e6 - 1.0).abs() < 0.03, "{report}");
        let sum = by("layers") + by("head") + by("embedding");
        assert_eq!(number("weight_bytes_per_token"), sum, "{report}");
        assert_eq!(decode.len(), 7, "{report}");
        let steps = report["steps"].as_object().unwrap();
        let dispatches: f64 = steps.values().map(|step| step["dispatches"].as_f64().unwrap()).sum();
        assert_eq!(number("dispatches_per_token"), dispatches, "{report}");
    }

    #[test]
    fn a_table_for_people() {
        let text = stdout(sterna(&format!("{DRY_RUN} --gemv gemv_planes -n 2")));
        for part in ["gemv_planes", "project_out", "head int8", "passes 1, submits 1"] {
            assert!(text.contains(part), "{text}");
        }
        // The built-in model, in full.
        stdout(sterna("bench --dry-run --prompt 5 -n 3"));
    }

    #[test]
    fn wrong_usage_exits_with_2() {
        for (arguments, part) in [
            ("bench --dry-run --device cpu", "--device gpu"),
            ("bench --dry-run --device gpu:0", "--device gpu"),
            ("bench --dry-run --synthetic gpt-2", "gpt-2"),
            ("bench --dry-run --synthetic bitnet-2b4t -m x", "--model"),
            ("bench --dry-run --prompt 0", "--prompt"),
            ("bench --dry-run --gemv x", "--gemv"),
        ] {
            let message = failure(sterna(arguments), 2);
            assert!(message.contains(part), "{arguments}: {message}");
        }
        let message = failure(sterna(&format!("{DRY_RUN} --prompt 5000")), 1);
        assert!(message.contains("4096"), "{message}");
    }
}
