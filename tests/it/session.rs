//! Sessions: several texts in one model, forked, switched, saved and restored.

use std::ops::ControlFlow;
use std::path::Path;

use sterna::backend::{Device, LoadOptions, Output, Want};
use sterna::generate::{FinishReason, Overflow};
use sterna::kv_cache::{BLOCK, KvFormat, KvShape};
use sterna::random::Random;
use sterna::session::Identity;
use sterna::synthetic::{SyntheticModel, tiny_bitnet};
use sterna::weights::WeightSource;
use sterna::{Error, GenerateOptions, Message, Model, Role, Session, Transformer, built_in};

const DEVICES: [Device; 2] = [Device::Reference, Device::Cpu];

fn tiny() -> SyntheticModel {
    SyntheticModel::new(tiny_bitnet(), 11)
}

fn load(model: &SyntheticModel, device: Device, kv: KvFormat) -> Transformer {
    let options = LoadOptions {
        context: Some(300),
        kv: Some(kv),
        max_batch: 32,
        threads: Some(2),
        ..LoadOptions::default()
    };
    Transformer::load(model, device, &options, &mut |_| {}).unwrap()
}

fn tokens(len: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.below(301) as u32).collect()
}

fn take(transformer: &mut Transformer, n: usize) -> Vec<u32> {
    (0..n).map(|i| transformer.next_token(n - i).unwrap()).collect()
}

/// `n` greedy tokens after a prompt, by themselves.
fn alone(transformer: &mut Transformer, prompt: &[u32], n: usize) -> Vec<u32> {
    let session = transformer.open();
    let before = transformer.switch(session).unwrap();
    transformer.prompt(prompt).unwrap();
    let found = take(transformer, n);
    let session = transformer.switch(before).unwrap();
    transformer.close(session).unwrap();
    found
}

/// What a session should hold: its tokens, and how many of them are in the cache.
struct Naive {
    session: Option<Session>,
    tokens: Vec<u32>,
    position: usize,
}

/// Opens, forks, switches, truncates, feeds and closes at random; every text goes on as if it were the
/// only one.
#[test]
fn any_order_of_operations_is_as_if_each_session_were_alone() {
    let model = tiny();
    for device in DEVICES {
        for (seed, kv) in [(1, KvFormat::F32), (2, KvFormat::Int8)] {
            let mut judge = load(&model, device, kv);
            let mut transformer = load(&model, device, kv);
            let mut random = Random::new(seed);
            // The current one has no handle.
            let mut current = 0;
            let mut all = vec![Naive { session: None, tokens: Vec::new(), position: 0 }];
            for step in 0..60 {
                match random.below(7) {
                    0 if all.len() < 5 => {
                        let session = Some(transformer.open());
                        all.push(Naive { session, tokens: Vec::new(), position: 0 });
                    }
                    1 if all.len() < 5 => {
                        let positions = random.below(all[current].position + 1);
                        let session = Some(transformer.fork(positions).unwrap());
                        let tokens = all[current].tokens[..positions].to_vec();
                        all.push(Naive { session, tokens, position: positions });
                    }
                    2 => {
                        let next = random.below(all.len());
                        if let Some(session) = all[next].session.take() {
                            let before = transformer.switch(session).unwrap();
                            all[current].session = Some(before);
                            current = next;
                        }
                    }
                    3 => {
                        let positions = random.below(all[current].position + 1);
                        transformer.truncate(positions);
                        let naive = &mut all[current];
                        naive.tokens.truncate(positions);
                        naive.position = positions;
                    }
                    4 if all.len() > 1 => {
                        let at = random.below(all.len());
                        if let Some(session) = all[at].session.take() {
                            transformer.close(session).unwrap();
                            all.remove(at);
                            current -= usize::from(at < current);
                        }
                    }
                    _ => {
                        let prompt = tokens(1 + random.below(70), 100 * seed + step);
                        let naive = &mut all[current];
                        let room = naive.position + prompt.len() + 3 <= transformer.capacity();
                        if room {
                            naive.tokens.truncate(naive.position);
                            naive.tokens.extend(&prompt);
                            transformer.prompt(&prompt).unwrap();
                            let found = take(&mut transformer, 3);
                            assert_eq!(found, alone(&mut judge, &naive.tokens, 3), "step {step}");
                            naive.tokens.extend(&found);
                            naive.position = naive.tokens.len() - 1;
                        }
                    }
                }
                let naive = &all[current];
                assert_eq!(transformer.session().tokens(), naive.tokens, "step {step}");
                assert_eq!(transformer.position(), naive.position, "step {step}");
                // No more blocks than the texts have apart, and one that each may have copied.
                let blocks: usize = all.iter().map(|n| n.position.div_ceil(BLOCK) + 1).sum();
                let most = blocks.max(5 * 300usize.div_ceil(BLOCK));
                let shape = KvShape::new(model.config(), kv);
                assert!(transformer.kv_bytes() <= (most * shape.block_bytes()) as u64);
            }
        }
    }
}

#[test]
fn a_session_goes_on_where_it_was_switched_away() {
    let model = tiny();
    for device in DEVICES {
        let mut transformer = load(&model, device, KvFormat::F16);
        let (first, second) = (tokens(50, 1), tokens(70, 2));
        let expected = [&first, &second].map(|prompt| alone(&mut transformer, prompt, 30));
        transformer.prompt(&first).unwrap();
        let mut found = [take(&mut transformer, 5), Vec::new()];
        let mut other = transformer.open();
        for turn in 1..8 {
            other = transformer.switch(other).unwrap();
            if turn == 1 {
                transformer.prompt(&second).unwrap();
            }
            found[turn % 2].extend(take(&mut transformer, 5));
        }
        assert_eq!(found[0], expected[0][..20]);
        assert_eq!(found[1], expected[1][..20]);
        // Another model's session, and a fork of more than there is.
        let stranger = load(&model, device, KvFormat::F16).open();
        assert!(matches!(transformer.switch(stranger), Err(Error::NoSequence)));
        let stranger = load(&model, device, KvFormat::F16).open();
        assert!(matches!(transformer.close(stranger), Err(Error::NoSequence)));
        let position = transformer.position();
        assert!(matches!(transformer.fork(position + 1), Err(Error::ContextOverflow { .. })));
        // An empty session has nothing to go on from.
        let empty = transformer.open();
        transformer.switch(empty).unwrap();
        assert!(matches!(transformer.next_token(1), Err(Error::NoToken)));
    }
}

/// Eight sessions of a prefix of 1,000 tokens: one prefix, and the same tokens as eight runs.
#[test]
fn eight_sessions_share_a_prefix() {
    const PREFIX: usize = 1000;
    let config = sterna::config::ModelConfig { max_position_embeddings: 2048, ..tiny_bitnet() };
    let model = SyntheticModel::new(config, 3);
    let options = LoadOptions { threads: Some(2), ..LoadOptions::default() };
    let mut transformer = Transformer::load(&model, Device::Cpu, &options, &mut |_| {}).unwrap();
    let shape = KvShape::new(model.config(), transformer.kv_format());
    let block = shape.block_bytes() as u64;
    let prefix = tokens(PREFIX, 1);
    let questions: Vec<_> = (0..8).map(|seed| tokens(10, 10 + seed)).collect();

    transformer.feed(&prefix, Want::Nothing).unwrap();
    assert_eq!(transformer.kv_bytes(), 16 * block);
    let mut sessions: Vec<_> = (0..8).map(|_| transformer.fork(PREFIX).unwrap()).collect();
    assert_eq!(transformer.kv_bytes(), 16 * block, "forks cost nothing");
    let mut found = Vec::new();
    for (session, question) in sessions.iter_mut().zip(&questions) {
        let mut other = transformer.open();
        std::mem::swap(session, &mut other);
        let before = transformer.switch(other).unwrap();
        transformer.prompt(question).unwrap();
        found.push(take(&mut transformer, 8));
        *session = transformer.switch(before).unwrap();
    }
    // 1,000 tokens end inside a block, of which each session has a copy.
    assert_eq!(transformer.kv_bytes(), (16 + 8) * block);
    for (found, question) in found.iter().zip(&questions) {
        assert_eq!(*found, alone(&mut transformer, &[&prefix[..], question].concat(), 8));
    }
}

#[test]
fn a_conversation_runs_only_what_is_new() {
    let mut model = built_in_model(Device::Cpu, None);
    let options = GenerateOptions { max_tokens: 20, ..GenerateOptions::default() };
    let first = "Once upon a time";
    let mut generation = model.generate(first, &options).unwrap();
    let text: String = generation.by_ref().map(|piece| piece.unwrap().text).collect();
    assert_eq!(generation.timings().cached_tokens, 0);
    let (prompt, made) = (generation.prompt().to_vec(), generation.tokens().to_vec());
    drop(generation);
    assert_eq!(model.transformer().session().tokens(), [&prompt[..], &made].concat());
    // The second turn begins with the first; its last token was not fed.
    let whole = [&prompt[..], &made, &prompt].concat();
    let mut generation = model.generate_tokens(whole.clone(), &options).unwrap();
    assert_eq!(generation.timings().cached_tokens, prompt.len() + made.len() - 1);
    let found: Vec<_> = generation.by_ref().map(|piece| piece.unwrap().token).collect();
    let mut fresh = built_in_model(Device::Cpu, None);
    let expected = fresh.generate_tokens(whole, &options).unwrap();
    assert_eq!(found, expected.map(|piece| piece.unwrap().token).collect::<Vec<_>>());
    // The same prompt again, and one that parts from it at once.
    let again: String =
        model.generate(first, &options).unwrap().map(|piece| piece.unwrap().text).collect();
    assert_eq!(again, text);
    let other = model.generate("A", &options).unwrap();
    assert!(other.timings().cached_tokens <= 1);
}

/// As a chat with a template: the second turn's prompt begins with the first turn.
#[test]
fn the_second_turn_of_a_chat_keeps_the_first() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bitnet-a-packed");
    let mut model = Model::load(path, Device::Reference).unwrap();
    let options = GenerateOptions { max_tokens: 4, ..GenerateOptions::default() };
    let mut messages = vec![Message::new(Role::User, "Why is the sky blue?")];
    let mut generation = model.generate_chat(&messages, &options).unwrap();
    let answer: String = generation.by_ref().map(|piece| piece.unwrap().text).collect();
    let first = generation.prompt().len();
    drop(generation);
    messages.push(Message::new(Role::Assistant, &answer));
    messages.push(Message::new(Role::User, "And at night?"));
    let generation = model.generate_chat(&messages, &options).unwrap();
    let cached = generation.timings().cached_tokens;
    assert!(cached >= first - 1 && cached < generation.prompt().len(), "{cached} of {first}");
}

#[test]
fn a_prompt_can_be_watched_and_cancelled() {
    let model = tiny();
    for device in DEVICES {
        let mut transformer = load(&model, device, KvFormat::F32);
        transformer.feed(&tokens(10, 1), Want::Nothing).unwrap();
        let prompt = tokens(100, 2);
        let mut seen = Vec::new();
        let result = transformer.prompt_with(&prompt, &mut |done, total| {
            seen.push((done, total));
            if done >= 64 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(result, Err(Error::Cancelled)));
        assert_eq!(seen, [(0, 100), (32, 100), (64, 100)]);
        assert_eq!((transformer.position(), transformer.session().tokens().len()), (10, 10));
        let mut last = 0;
        let mut watch = |done, _| {
            last = done;
            ControlFlow::Continue(())
        };
        transformer.prompt_with(&prompt, &mut watch).unwrap();
        assert_eq!((last, transformer.position()), (100, 110));
        let found = take(&mut transformer, 5);
        let whole = [tokens(10, 1), prompt].concat();
        assert_eq!(found, alone(&mut transformer, &whole, 5));
    }
}

fn built_in_model(device: Device, kv: Option<KvFormat>) -> Model {
    let options = LoadOptions { kv, threads: Some(2), ..LoadOptions::default() };
    let checkpoint = built_in::checkpoint().unwrap();
    Model::from_checkpoint(&checkpoint, device, &options, &mut |_| {}).unwrap()
}

#[test]
fn a_full_context_stops_or_shifts() {
    const CONTEXT: usize = 40;
    let options = LoadOptions { context: Some(CONTEXT), ..LoadOptions::default() };
    let checkpoint = built_in::checkpoint().unwrap();
    let load = || Model::from_checkpoint(&checkpoint, Device::Cpu, &options, &mut |_| {}).unwrap();
    let mut model = load();
    let stop = GenerateOptions { max_tokens: 100, ..GenerateOptions::default() };
    let mut generation = model.generate("Once upon a time", &stop).unwrap();
    let stopped: Vec<u32> = generation.by_ref().map(|piece| piece.unwrap().token).collect();
    assert_eq!(generation.finish_reason(), Some(FinishReason::ContextFull));
    let prompt = generation.prompt().to_vec();
    assert_eq!(prompt.len() + stopped.len(), CONTEXT + 1);

    let shift = GenerateOptions { overflow: Overflow::Shift, ..stop };
    let mut generation = model.generate("Once upon a time", &shift).unwrap();
    let shifted: Vec<u32> = generation.by_ref().map(|piece| piece.unwrap().token).collect();
    let reason = generation.finish_reason();
    assert!(matches!(reason, Some(FinishReason::Length | FinishReason::Stop)), "{reason:?}");
    assert_eq!(shifted[..stopped.len()], stopped);
    assert!(shifted.len() > stopped.len());

    // What follows is what a fresh prompt of the kept tokens gives.
    let mut text = [&prompt[..], &stopped].concat();
    let mut left = &shifted[stopped.len()..];
    while !left.is_empty() {
        let kept = Overflow::shifted(&text, CONTEXT);
        assert_eq!(kept.len(), CONTEXT / 2);
        assert_eq!(kept[..10], text[..10]);
        assert_eq!(kept[10..], text[text.len() - 10..]);
        let options = GenerateOptions { max_tokens: left.len(), ..stop };
        let mut fresh = load();
        let found = fresh.generate_tokens(kept.clone(), &options).unwrap();
        let found: Vec<u32> = found.map(|piece| piece.unwrap().token).collect();
        assert_eq!(left[..found.len()], found);
        left = &left[found.len()..];
        text = [kept, found].concat();
    }
    // A prompt that does not fit says so, with both numbers and what to do.
    let error = model.generate_tokens(vec![5; CONTEXT + 1], &shift).err().unwrap().to_string();
    assert!(error.contains("41") && error.contains("40") && error.contains("--context"), "{error}");
    assert_eq!(Overflow::shifted(&(0..1001).collect::<Vec<_>>(), 1000)[..65], {
        let mut first: Vec<u32> = (0..64).collect();
        first.push(1001 - (500 - 64));
        first
    });
    assert_eq!(Overflow::shifted(&[1, 2], 1), [2]);
}

/// Saves on one device, restores on another: the same greedy tokens, as if nothing had happened.
#[test]
fn a_snapshot_goes_on_on_another_backend() {
    let model = tiny();
    let identity = model.identity().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session");
    for (kv, into) in [
        (KvFormat::F32, KvFormat::F32),
        (KvFormat::F16, KvFormat::F16),
        (KvFormat::F16, KvFormat::F32),
        (KvFormat::Int8, KvFormat::Int8),
    ] {
        for (from, to) in [(0, 1), (1, 0), (1, 1)].map(|(a, b)| (DEVICES[a], DEVICES[b])) {
            let mut origin = load(&model, from, kv);
            origin.prompt(&tokens(130, 5)).unwrap();
            let before = take(&mut origin, 7);
            origin.save(&path, &identity).unwrap();
            let expected = take(&mut origin, 20);

            let mut other = load(&model, to, into);
            let session = other.restore(&path, &identity).unwrap();
            assert_eq!(session.tokens(), [tokens(130, 5), before].concat());
            assert_eq!(session.position(), 136);
            other.switch(session).unwrap();
            if kv == into {
                assert_eq!(take(&mut other, 20), expected, "{kv:?}, {from:?} to {to:?}");
            } else {
                // New positions are held more exactly than those of the file.
                take(&mut other, 20);
            }
            // Restored blocks are the saved ones.
            other.truncate(136);
            let again = directory.path().join("again");
            let mut origin = load(&model, from, kv);
            let session = origin.restore(&path, &identity).unwrap();
            origin.switch(session).unwrap();
            origin.save(&again, &identity).unwrap();
            assert!(std::fs::read(&again).unwrap() == std::fs::read(&path).unwrap());
        }
    }
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_and_changes_nothing() {
    let model = tiny();
    let identity = model.identity().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("session");
    let mut transformer = load(&model, Device::Cpu, KvFormat::Int8);
    transformer.prompt(&tokens(100, 5)).unwrap();
    transformer.save(&path, &identity).unwrap();
    let sound = std::fs::read(&path).unwrap();
    let expected = take(&mut transformer, 5);
    let in_use = transformer.kv_bytes();

    let refused = |transformer: &mut Transformer, identity: &Identity| {
        let error = transformer.restore(&path, identity).unwrap_err();
        assert!(error.to_string().contains("session"), "{error}");
        error
    };
    // Another model: another seed, and the same weights with another context would do.
    let other = SyntheticModel::new(tiny_bitnet(), 12).identity().unwrap();
    let error = refused(&mut transformer, &other);
    assert!(matches!(error, Error::SnapshotModel { .. }), "{error}");
    let mut f32_cache = load(&model, Device::Cpu, KvFormat::F32);
    let error = refused(&mut f32_cache, &identity);
    assert!(matches!(error, Error::SnapshotFormat { .. }), "{error}");
    assert!(error.to_string().contains("--kv int8"), "{error}");
    // A flipped bit anywhere: header, tokens, keys, scales, checksum.
    for at in [0, 9, 13, 20, 50, 63, 70, 600, sound.len() / 2, sound.len() - 40, sound.len() - 1] {
        let mut damaged = sound.clone();
        damaged[at] ^= 4;
        std::fs::write(&path, damaged).unwrap();
        refused(&mut transformer, &identity);
    }
    for len in [0, 10, 68, 100, sound.len() - 1] {
        std::fs::write(&path, &sound[..len]).unwrap();
        refused(&mut transformer, &identity);
    }
    // What failed has left the blocks free: the next session takes them.
    std::fs::write(&path, &sound).unwrap();
    let session = transformer.restore(&path, &identity).unwrap();
    let block = KvShape::new(model.config(), KvFormat::Int8).block_bytes() as u64;
    assert_eq!(transformer.kv_bytes(), in_use + 2 * block);
    transformer.switch(session).unwrap();
    assert_eq!(take(&mut transformer, 5), expected);
    let error = transformer.restore(&directory.path().join("none"), &identity).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    let error = transformer.save(&directory.path().join("none/session"), &identity).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing partial is left");
}

#[test]
fn a_model_saves_and_restores_its_text() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("story.session");
    let options = GenerateOptions { max_tokens: 30, ..GenerateOptions::default() };
    let mut model = built_in_model(Device::Cpu, None);
    let whole: Vec<u32> = {
        let options = GenerateOptions { max_tokens: 60, ..options };
        let generation = model.generate("Once upon a time", &options).unwrap();
        generation.map(|piece| piece.unwrap().token).collect()
    };
    assert_eq!(model.generate("Once upon a time", &options).unwrap().count(), 30);
    model.save_session(&path).unwrap();
    let mut other = built_in_model(Device::Reference, None);
    other.load_session(&path).unwrap();
    let mut generation = other.append("", &options).unwrap();
    let found: Vec<u32> = generation.by_ref().map(|piece| piece.unwrap().token).collect();
    assert_eq!(generation.timings().cached_tokens + 1, generation.timings().prompt_tokens);
    assert_eq!(found, whole[30..]);
    // Another model's tensors are another identity, and so are other bytes of the same ones.
    let path_of =
        |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let mut stranger = Model::load(path_of("bitnet-a-packed"), Device::Reference).unwrap();
    assert!(matches!(stranger.load_session(&path), Err(Error::SnapshotModel { .. })));
    let identity =
        |name: &str| sterna::Checkpoint::open(&path_of(name)).unwrap().identity().unwrap();
    assert_eq!(identity("bitnet-a-packed"), identity("bitnet-a-packed"));
    assert_ne!(identity("bitnet-a-packed"), identity("bitnet-a-bf16"));
}

/// Feeding in a session is feeding alone, with logits too.
#[test]
fn logits_of_a_fork_are_those_of_a_fresh_run() {
    let model = tiny();
    let mut transformer = load(&model, Device::Cpu, KvFormat::F16);
    transformer.feed(&tokens(100, 1), Want::Nothing).unwrap();
    let fork = transformer.fork(77).unwrap();
    transformer.feed(&tokens(50, 2), Want::Nothing).unwrap();
    transformer.switch(fork).unwrap();
    let Output::Logits(found) = transformer.feed(&tokens(9, 3), Want::AllLogits).unwrap() else {
        panic!("logits");
    };
    let mut fresh = load(&model, Device::Cpu, KvFormat::F16);
    fresh.feed(&tokens(100, 1)[..77], Want::Nothing).unwrap();
    let expected = fresh.feed(&tokens(9, 3), Want::AllLogits).unwrap();
    assert!(expected == Output::Logits(found));
}
