//! Guessing ahead: the same tokens as one by one, in fewer passes where a text repeats itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use sterna::backend::reference::Reference;
use sterna::backend::simd::SimdBackend;
use sterna::backend::{
    Backend, Batch, DeviceInfo, LoadOptions, MAX_DRAFT, OnProgress, Output, Tap, Tokens, Want,
};
use sterna::config::ModelConfig;
use sterna::generate::FinishReason;
use sterna::kv_cache::{Blocks, KvFormat};
use sterna::random::Random;
use sterna::sampler::{Sampler, Sampling};
use sterna::speculate::SpeculationWork;
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::weights::WeightSource;
use sterna::{Device, Error, GenerateOptions, Model, Result, Speculate, Transformer, built_in};

const DEVICES: [Device; 2] = [Device::Reference, Device::Cpu];

/// Prompts that repeat themselves, and ones that do not.
const PROMPTS: [&str; 5] = [
    "The cat sat on the mat. The cat sat on the mat. The cat sat",
    "1. red\n2. blue\n3. red\n4. blue\n5. red\n6.",
    "let a = one(b);\nlet b = one(c);\nlet c = one(d);\nlet d =",
    "Once upon a time",
    "\"Can we keep it?\" he asked. \"Yes,\" she said.",
];

fn random(temperature: f32, top_k: Option<usize>, top_p: f32, min_p: f32, seed: u64) -> Sampling {
    Sampling::Random { temperature, top_k, top_p, min_p, seed }
}

/// Every way to choose, with the penalty.
fn samplings() -> Vec<(Sampling, f32)> {
    vec![
        (Sampling::Greedy, 1.0),
        (Sampling::Greedy, 1.3),
        // What has occurred is likely to occur again: the text repeats itself.
        (Sampling::Greedy, 0.5),
        (random(0.8, None, 1.0, 0.0, 1), 1.0),
        (random(1.2, Some(20), 1.0, 0.0, 2), 1.0),
        (random(1.0, None, 0.9, 0.05, 3), 0.7),
    ]
}

fn load(device: Device, context: Option<usize>) -> Model {
    let options = LoadOptions { context, ..LoadOptions::default() };
    Model::from_checkpoint(&built_in::checkpoint().unwrap(), device, &options, &mut |_| {}).unwrap()
}

struct Text {
    tokens: Vec<u32>,
    pieces: String,
    finish: Option<FinishReason>,
    work: Option<SpeculationWork>,
    position: usize,
}

fn write(model: &mut Model, prompt: &str, options: &GenerateOptions) -> Text {
    let mut generation = model.generate(prompt, options).unwrap();
    let pieces = generation.by_ref().map(|piece| piece.unwrap().text).collect();
    let (tokens, finish) = (generation.tokens().to_vec(), generation.finish_reason());
    let work = generation.speculation();
    Text { tokens, pieces, finish, work, position: model.transformer().position() }
}

/// Writes a text with and without guessing, and fails on any difference.
#[track_caller]
fn write_both(model: &mut Model, prompt: &str, options: GenerateOptions) -> Text {
    let off = write(model, prompt, &GenerateOptions { speculate: Speculate::Off, ..options });
    let on = write(model, prompt, &GenerateOptions { speculate: Speculate::Prompt, ..options });
    let what = format!("{prompt:?} {options:?}");
    assert_eq!(on.tokens, off.tokens, "{what}");
    assert_eq!((on.pieces.as_str(), on.finish), (off.pieces.as_str(), off.finish), "{what}");
    assert_eq!(on.position, off.position, "{what}");
    assert_eq!(off.work, None);
    let work = on.work.expect("guessing is on");
    assert_eq!(work.passes + work.accepted + 1, on.tokens.len() as u64, "{what}: {work:?}");
    on
}

#[test]
fn texts_are_the_same_and_repetitive_ones_take_fewer_passes() {
    for device in DEVICES {
        let mut model = load(device, None);
        let (mut tokens, mut passes) = (0, 0);
        // The reference is slow.
        let (step, max_tokens) = if device == Device::Reference { (2, 24) } else { (1, 60) };
        for (sampling, repetition_penalty) in samplings().into_iter().step_by(step) {
            let options = GenerateOptions {
                max_tokens,
                sampling,
                repetition_penalty,
                ..GenerateOptions::default()
            };
            for prompt in PROMPTS.into_iter().step_by(step) {
                let text = write_both(&mut model, prompt, options);
                if repetition_penalty == 0.5 {
                    tokens += text.tokens.len() as u64;
                    passes += text.work.unwrap().passes;
                }
            }
        }
        assert!(passes * 3 < tokens * 2, "{device:?}: {passes} passes for {tokens} tokens");
    }
}

#[test]
fn a_text_ends_at_any_length() {
    let mut model = load(Device::Cpu, None);
    for max_tokens in 1..=40 {
        let options =
            GenerateOptions { max_tokens, repetition_penalty: 0.5, ..GenerateOptions::default() };
        let text = write_both(&mut model, PROMPTS[0], options);
        assert_eq!(text.tokens.len(), max_tokens);
        assert_eq!(text.finish, Some(FinishReason::Length));
    }
}

#[test]
fn a_context_ends_inside_of_a_draft() {
    let prompt_len = load(Device::Cpu, None).tokenizer().encode(PROMPTS[0], true).unwrap().len();
    for room in 0..=24 {
        let mut model = load(Device::Cpu, Some(prompt_len + room));
        let options = GenerateOptions { repetition_penalty: 0.5, ..GenerateOptions::default() };
        let text = write_both(&mut model, PROMPTS[0], options);
        assert_eq!((text.tokens.len(), text.finish), (room + 1, Some(FinishReason::ContextFull)));
        assert_eq!(text.position, prompt_len + room);
    }
}

#[test]
fn a_stop_token_ends_the_text_inside_of_a_draft() {
    // Stories end: in a prompt that has a whole story with its end, and its beginning again, the end is
    // drafted.
    for device in DEVICES {
        let mut model = load(device, None);
        let stop = model.stop_ids()[0];
        let story = model.generate("Once upon a time", &GenerateOptions::default()).unwrap();
        let mut prompt = story.prompt().to_vec();
        prompt.extend(story.map(|piece| piece.unwrap().token));
        assert_eq!(prompt.last(), Some(&stop), "the story has an end");
        let start = prompt.len() - 12;
        let tail = prompt[start..prompt.len() - 3].to_vec();
        prompt.extend(tail);
        let mut texts = Vec::new();
        for speculate in [Speculate::Off, Speculate::Prompt] {
            // As before, but for what has occurred: the stop token too.
            let options = GenerateOptions {
                speculate,
                repetition_penalty: 0.3,
                ..GenerateOptions::default()
            };
            let mut generation = model.generate_tokens(prompt.clone(), &options).unwrap();
            let pieces: Vec<_> = generation.by_ref().map(|piece| piece.unwrap()).collect();
            let (finish, work) = (generation.finish_reason(), generation.speculation());
            texts.push((pieces, finish, model.transformer().position()));
            if let Some(SpeculationWork { accepted, .. }) = work {
                assert!(accepted > 0, "{device:?}: {work:?}");
            }
        }
        assert_eq!(texts[0], texts[1]);
        assert_eq!(texts[0].1, Some(FinishReason::Stop), "{device:?}");
    }
}

type Loader = fn(&dyn WeightSource, &LoadOptions, OnProgress<'_>) -> Result<Box<dyn Backend>>;

const LOADERS: [Loader; 2] = [
    |source, options, progress| Ok(Box::new(Reference::load(source, options, progress)?)),
    |source, options, progress| Ok(Box::new(SimdBackend::load(source, options, progress)?)),
];

fn models() -> Vec<(ModelConfig, bool)> {
    vec![
        (tiny_bitnet(), false),
        (tiny_llama(), false),
        (tiny_normed(), false),
        (tiny_bonsai(1, 128), false),
        (tiny_bonsai(2, 64), true),
    ]
}

fn transformer(loader: Loader, config: &ModelConfig, int8_activations: bool) -> Transformer {
    let source = SyntheticModel::new(config.clone(), 7);
    let options =
        LoadOptions { context: Some(96), int8_activations, threads: Some(2), ..Default::default() };
    Transformer::new(config.clone(), loader(&source, &options, &mut |_| {}).unwrap())
}

/// The first tokens of a text.
fn one_by_one(model: &mut Transformer, prompt: &[u32], sampler: &Sampler, n: usize) -> Vec<u32> {
    model.reset();
    model.choose_with(sampler.clone()).unwrap();
    model.prompt(prompt).unwrap();
    (0..n).map(|_| model.next_token(1).unwrap()).collect()
}

/// The same with drafts of random lengths, of which some tokens are wrong.
fn by_drafts(
    model: &mut Transformer,
    prompt: &[u32],
    sampler: &Sampler,
    expected: &[u32],
    random: &mut Random,
) -> Result<Vec<u32>> {
    model.reset();
    model.choose_with(sampler.clone())?;
    model.prompt(prompt)?;
    let mut text = vec![model.next_token(1)?];
    while text.len() < expected.len() {
        assert_eq!(model.position(), prompt.len() + text.len() - 1);
        let rest = &expected[text.len()..];
        if random.below(4) == 0 {
            text.push(model.next_token(1)?);
            continue;
        }
        let limit = model.draft_limit().min(rest.len() - 1);
        let mut draft = rest[..random.below(limit + 1)].to_vec();
        for token in &mut draft {
            *token = if random.below(6) == 0 { random.below(301) as u32 } else { *token };
        }
        let last = *text.last().expect("the prompt's");
        let found = check(model, last, &draft, |_| false)?;
        assert!(found.len() <= draft.len() + 1);
        text.extend(found);
    }
    Ok(text)
}

/// Checks a draft and takes the tokens that it makes.
fn check(
    model: &mut Transformer,
    last: u32,
    draft: &[u32],
    ends: impl Fn(u32) -> bool,
) -> Result<Vec<u32>> {
    let position = model.position();
    let found = model.check_draft(last, draft, ends)?;
    assert_eq!((model.position(), model.ahead()), (position, found.len()));
    let taken = found.iter().map(|_| model.next_token(1)).collect::<Result<Vec<_>>>()?;
    assert_eq!((&taken, model.ahead()), (&found, 0));
    Ok(found)
}

#[test]
fn drafts_right_and_wrong_lead_to_the_same_tokens() {
    let mut random = Random::new(31);
    let prompt: Vec<u32> = (0..9).map(|i| i * 37 % 301).collect();
    for (index, (config, int8)) in models().into_iter().enumerate() {
        // The reference is slow.
        for (loader, n) in LOADERS.into_iter().zip([16, 40]).skip(index % 4 / 2) {
            let mut model = transformer(loader, &config, int8);
            for (sampling, penalty) in samplings().into_iter().step_by(48 / n) {
                let mut sampler = Sampler::new(sampling, penalty).unwrap();
                sampler.observe(&prompt);
                let expected = one_by_one(&mut model, &prompt, &sampler, n);
                let found = by_drafts(&mut model, &prompt, &sampler, &expected, &mut random);
                assert_eq!(found.unwrap(), expected, "{sampling:?}, penalty {penalty}");
            }
        }
    }
}

/// A backend that believes the first wrong token of every draft, or whose sampler goes on from one token
/// more or less than was kept.
struct Gullible {
    backend: Box<dyn Backend>,
    mistake: Mistake,
    batch: Vec<u32>,
    taken: usize,
    mistakes: Arc<AtomicUsize>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mistake {
    None,
    Believes,
    KeepsLess,
    DoesNotKeep,
}

impl Backend for Gullible {
    fn device(&self) -> &DeviceInfo {
        self.backend.device()
    }
    fn max_batch(&self) -> usize {
        self.backend.max_batch()
    }
    fn capacity(&self) -> usize {
        self.backend.capacity()
    }
    fn sequences(&mut self) -> &mut Blocks {
        self.backend.sequences()
    }
    fn kv_format(&self) -> KvFormat {
        self.backend.kv_format()
    }
    fn kv_bytes(&self) -> u64 {
        self.backend.kv_bytes()
    }
    fn read_block(&mut self, block: u32) -> Result<Vec<u8>> {
        self.backend.read_block(block)
    }
    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.backend.write_block(block, bytes)
    }
    fn choose_with(&mut self, sampler: Sampler) -> Result<()> {
        self.backend.choose_with(sampler)
    }
    fn begin(&mut self, batch: Batch<'_>) -> Result<()> {
        self.batch.clear();
        self.taken = 0;
        if let (Tokens::Given(tokens), Want::Tokens) = (batch.tokens, batch.want) {
            self.batch.extend(tokens);
        }
        self.backend.begin(batch)
    }
    fn embed(&mut self) -> Result<()> {
        self.backend.embed()
    }
    fn qkv(&mut self, layer: usize) -> Result<()> {
        self.backend.qkv(layer)
    }
    fn attend(&mut self, layer: usize) -> Result<()> {
        self.backend.attend(layer)
    }
    fn project_out(&mut self, layer: usize) -> Result<()> {
        self.backend.project_out(layer)
    }
    fn gate_up(&mut self, layer: usize) -> Result<()> {
        self.backend.gate_up(layer)
    }
    fn down(&mut self, layer: usize) -> Result<()> {
        self.backend.down(layer)
    }
    fn head(&mut self) -> Result<()> {
        self.backend.head()
    }
    fn choose(&mut self) -> Result<()> {
        self.backend.choose()
    }
    fn finish(&mut self) -> Result<Output> {
        self.backend.finish()
    }
    fn take(&mut self) -> Result<u32> {
        let token = self.backend.take()?;
        self.taken += 1;
        match self.batch.get(self.taken) {
            Some(&drafted) if drafted != token && self.mistake == Mistake::Believes => {
                self.mistakes.fetch_add(1, Relaxed);
                Ok(drafted)
            }
            _ => Ok(token),
        }
    }
    fn keep(&mut self, n: usize) -> Result<()> {
        match self.mistake {
            Mistake::KeepsLess if n > 1 => {
                self.mistakes.fetch_add(1, Relaxed);
                self.backend.keep(n - 1)
            }
            Mistake::DoesNotKeep => {
                self.mistakes.fetch_add(1, Relaxed);
                Ok(())
            }
            _ => self.backend.keep(n),
        }
    }
    fn read(&mut self, tap: Tap) -> Result<Vec<f32>> {
        self.backend.read(tap)
    }
}

#[test]
fn the_judge_objects_to_a_wrong_check() {
    let prompt: Vec<u32> = (0..9).map(|i| i * 37 % 301).collect();
    let config = tiny_bitnet();
    let sampling = random(1.0, None, 1.0, 0.0, 4);
    for mistake in [Mistake::None, Mistake::Believes, Mistake::KeepsLess, Mistake::DoesNotKeep] {
        let mut sampler = Sampler::new(sampling, 1.5).unwrap();
        sampler.observe(&prompt);
        let mut judge = transformer(LOADERS[1], &config, false);
        let expected = one_by_one(&mut judge, &prompt, &sampler, 40);
        let source = SyntheticModel::new(config.clone(), 7);
        let options = LoadOptions { context: Some(96), ..LoadOptions::default() };
        let backend = LOADERS[1](&source, &options, &mut |_| {}).unwrap();
        let mistakes = Arc::new(AtomicUsize::new(0));
        let (batch, counted) = (Vec::new(), Arc::clone(&mistakes));
        let gullible = Gullible { backend, mistake, batch, taken: 0, mistakes: counted };
        let mut model = Transformer::new(config.clone(), Box::new(gullible));
        let found =
            by_drafts(&mut model, &prompt, &sampler, &expected, &mut Random::new(5)).unwrap();
        let is_wrong = mistakes.load(Relaxed) > 0;
        assert_eq!(is_wrong, mistake != Mistake::None);
        assert_eq!(found[..40] == expected, !is_wrong, "{mistake:?}");
    }
}

#[test]
fn drafts_that_cannot_be_checked_are_refused() {
    for loader in LOADERS {
        let mut model = transformer(loader, &tiny_bitnet(), false);
        model.prompt(&[1, 2, 3]).unwrap();
        // Its next token was not taken.
        assert_eq!(model.draft_limit(), 0);
        let token = model.next_token(1).unwrap();
        assert_eq!((model.position(), model.draft_limit()), (3, MAX_DRAFT));
        let long = check(&mut model, token, &[0; MAX_DRAFT + 1], |_| false);
        assert!(matches!(long, Err(Error::Dimension { found: 8, max: 7, .. })), "{long:?}");
        let unknown = check(&mut model, token, &[5, 1 << 20], |_| false);
        assert!(matches!(unknown, Err(Error::TokenOutOfRange { .. })), "{unknown:?}");
        // It goes on from where it was.
        assert_eq!(model.position(), 3);
        assert_eq!(check(&mut model, token, &[], |_| false).unwrap().len(), 1);
        assert_eq!(model.position(), 4);
        // As many as there is room for.
        model.reset();
        model.prompt(&[1; 94]).unwrap();
        model.next_token(1).unwrap();
        assert_eq!(model.draft_limit(), 1);
    }
    // A batch of one token has no room for a draft.
    let source = SyntheticModel::new(tiny_bitnet(), 7);
    let options = LoadOptions { max_batch: 1, ..LoadOptions::default() };
    let mut model = Transformer::load(&source, Device::Cpu, &options, &mut |_| {}).unwrap();
    model.prompt(&[1, 2]).unwrap();
    model.next_token(1).unwrap();
    assert_eq!(model.draft_limit(), 0);
}

#[test]
fn a_token_that_ends_a_text_is_the_last_one() {
    let mut model = transformer(LOADERS[1], &tiny_bitnet(), false);
    let prompt: Vec<u32> = (0..9).map(|i| i * 37 % 301).collect();
    let sampler = Sampler::new(random(1.0, None, 1.0, 0.0, 4), 1.0).unwrap();
    let expected = one_by_one(&mut model, &prompt, &sampler, 20);
    for end in 1..=7 {
        one_by_one(&mut model, &prompt, &sampler, 1);
        let stop = expected[end];
        let first = expected[1..].iter().position(|&token| token == stop).unwrap() + 1;
        let found = check(&mut model, expected[0], &expected[1..8], |token| token == stop).unwrap();
        assert_eq!(found, expected[1..=first]);
        assert_eq!(model.position(), prompt.len() + first);
        // And a text that goes on all the same goes on from there.
        let rest: Vec<u32> = (first + 1..20).map(|_| model.next_token(1).unwrap()).collect();
        assert_eq!(rest, expected[first + 1..]);
    }
}
