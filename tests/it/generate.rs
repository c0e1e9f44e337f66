//! Text from a model, through the library's API, on the scalar reference.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sterna::generate::FinishReason;
use sterna::{Device, Error, GenerateOptions, Message, Model, Role, Sampling};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn model() -> Model {
    Model::load(golden("bitnet-a-packed"), Device::Reference).unwrap()
}

fn golden_json(name: &str) -> Value {
    let file = std::fs::read(golden("expected").join(name)).unwrap();
    serde_json::from_slice(&file).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ..GenerateOptions::default() }
}

#[test]
fn greedy_tokens_are_those_of_the_original() {
    let prompt = ids(&golden_json("prompts.json")["p17"]);
    let run = &golden_json("bitnet-a-packed.json")["runs"]["float32"];
    let expected = ids(&run["greedy64_from_p17"]);
    let mut model = model();
    let mut generation = model.generate_tokens(prompt, &greedy(5)).unwrap();
    assert_eq!(generation.finish_reason(), None);
    assert_eq!(generation.by_ref().count(), 5);
    // The gaps between the best two logits are wide up to the fifth token.
    assert_eq!(generation.tokens(), &expected[..5]);
    assert_eq!(generation.finish_reason(), Some(FinishReason::Length));
    let timings = generation.timings();
    assert_eq!((timings.prompt_tokens, timings.generated_tokens), (17, 5));
    assert!(timings.prompt_rate().is_some() && timings.decode_rate().is_some());
}

#[test]
fn argmax_on_the_device_equals_argmax_here() {
    let mut model = model();
    let mut tokens = |sampling| {
        let options = GenerateOptions { sampling, ..greedy(32) };
        let generation = model.generate("Hello, world", &options).unwrap();
        generation.map(|piece| piece.unwrap().token).collect::<Vec<_>>()
    };
    let one_candidate =
        Sampling::Random { temperature: 1.0, top_k: Some(1), top_p: 1.0, min_p: 0.0, seed: 0 };
    assert_eq!(tokens(Sampling::Greedy), tokens(one_candidate));
}

#[test]
fn pieces_make_the_text_of_all_tokens() {
    let mut model = model();
    for seed in 0..4 {
        let sampling =
            Sampling::Random { temperature: 1.5, top_k: None, top_p: 1.0, min_p: 0.0, seed };
        let options = GenerateOptions { sampling, ..greedy(40) };
        let pieces: Vec<_> =
            model.generate("Hello", &options).unwrap().collect::<Result<_, _>>().unwrap();
        let text: String = pieces.iter().map(ToString::to_string).collect();
        let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
        assert_eq!(text, model.tokenizer().decode(&tokens, true).unwrap());
    }
}

#[test]
fn each_text_starts_afresh() {
    let mut model = model();
    let mut text = |prompt| {
        let generation = model.generate(prompt, &greedy(8)).unwrap();
        generation.map(|piece| piece.unwrap().text).collect::<String>()
    };
    let first = text("Hello");
    assert_ne!(text("Something else"), first);
    assert_eq!(text("Hello"), first);
}

#[test]
fn what_cannot_be_generated_is_an_error() {
    let mut model = model();
    let options = greedy(1);
    assert!(matches!(model.generate_tokens(vec![], &options), Err(Error::EmptyPrompt)));
    let long = model.generate_tokens(vec![1; 4097], &options).err().unwrap();
    assert!(matches!(long, Error::ContextOverflow { needed: 4097, capacity: 4096 }), "{long}");
    let sampling = GenerateOptions { repetition_penalty: 0.0, ..options };
    assert!(matches!(model.generate("x", &sampling), Err(Error::Sampling { .. })));
    // A wrong token shows when the prompt runs; then the text is over.
    let mut generation = model.generate_tokens(vec![1, 1000], &options).unwrap();
    assert!(matches!(generation.next(), Some(Err(Error::TokenOutOfRange { token: 1000, .. }))));
    assert!(generation.next().is_none());
    assert_eq!(generation.finish_reason(), None);
    // And the model still works.
    assert_eq!(model.generate("x", &options).unwrap().count(), 1);
}

#[test]
fn a_chat_is_the_rendered_prompt() {
    let chat = &golden_json("tokens.json")["chat"];
    let messages: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
    assert_eq!(messages[0].role, Role::System);
    let mut model = model();
    assert_eq!(model.stop_ids(), [993, 996]);
    let generation = model.generate_chat(&messages, &greedy(1)).unwrap();
    assert_eq!(generation.prompt(), ids(&chat["ids"]));
}
