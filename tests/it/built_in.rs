//! The built-in model: the same tokens on the CPU backends, and stories without loops.

use std::collections::HashMap;

use sterna::{Device, GenerateOptions, LoadOptions, Model, Sampling, built_in};

const PROMPT: &str = "Once upon a time";

fn model(device: Device) -> Model {
    let checkpoint = built_in::checkpoint().unwrap();
    Model::from_checkpoint(&checkpoint, device, &LoadOptions::default(), &mut |_| {}).unwrap()
}

fn tokens(model: &mut Model, options: &GenerateOptions) -> Vec<u32> {
    let generation = model.generate(PROMPT, options).unwrap();
    generation.map(|piece| piece.unwrap().token).collect()
}

#[test]
fn greedy_text_is_the_same_on_ref_and_cpu() {
    let options = GenerateOptions { max_tokens: 64, ..GenerateOptions::default() };
    let expected = tokens(&mut model(Device::Reference), &options);
    assert_eq!(expected.len(), 64);
    assert_eq!(tokens(&mut model(Device::Cpu), &options), expected);
}

/// Ten seeds at temperature 0.7, 200 tokens: no run of 12 tokens comes three times.
#[test]
fn stories_do_not_loop() {
    const RUN: usize = 12;
    let mut model = model(Device::Cpu);
    for seed in 0..10 {
        let (temperature, top_p, min_p) = (0.7, 1.0, 0.0);
        let sampling = Sampling::Random { temperature, top_k: None, top_p, min_p, seed };
        let options = GenerateOptions { max_tokens: 200, sampling, ..GenerateOptions::default() };
        let story = tokens(&mut model, &options);
        assert!(story.len() > 50, "seed {seed}: a story of {} tokens", story.len());
        let mut runs: HashMap<&[u32], usize> = HashMap::new();
        for run in story.windows(RUN) {
            let count = runs.entry(run).or_default();
            *count += 1;
            assert!(*count < 3, "seed {seed}: {run:?} comes three times in {story:?}");
        }
    }
}
