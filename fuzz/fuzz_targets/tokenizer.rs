//! The tokenizer of a GGUF file: sections split by NUL (switches, tokens, kinds, merges, template,
//! text), lists of a section by line.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::tokenizer::{ChatTemplate, GgufVocabulary, Message, Role, Tokenizer};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut sections = text.split('\0');
    let mut section = || sections.next().unwrap_or_default();
    let switches = section().as_bytes();
    let switch = |i: usize| switches.get(i).copied().unwrap_or(b'0').wrapping_sub(b'0');
    let lines = |section: &str| -> Vec<String> { section.lines().map(str::to_owned).collect() };
    let tokens = lines(section());
    let kinds = section();
    let id = |i| (switch(i) < 128).then(|| u32::from(switch(i)));
    let flag = |i| [None, Some(false), Some(true)][usize::from(switch(i) % 3)];
    let names = ["llama-bpe", "qwen2", "gpt-2", "falcon", "default", "qwen35"];
    let vocabulary = GgufVocabulary {
        file: "fuzz".to_owned(),
        architecture: "llama".to_owned(),
        model: if switch(0) % 2 == 0 { "gpt2" } else { "llama" }.to_owned(),
        pre: names.get(usize::from(switch(1))).map(|&name| name.to_owned()),
        // Scores that tie and differ, from the tokens' own lengths.
        scores: tokens.iter().map(|token| -(token.len() as f32)).collect(),
        token_types: kinds.bytes().map(|kind| i32::from(kind.wrapping_sub(b'0'))).collect(),
        tokens,
        merges: lines(section()),
        bos_id: id(2),
        eos_id: id(3),
        eot_id: id(4),
        unknown_id: id(5),
        padding_id: None,
        add_bos: flag(6),
        add_eos: flag(7),
        add_space_prefix: flag(8),
        chat_template: Some(section().to_owned()),
    };
    let prompt = section();
    // The reader of byte-level vocabularies keeps several maps of every token.
    let vocab_size = vocabulary.tokens.len().max(1);
    let read = || Tokenizer::from_gguf(&vocabulary, vocab_size);
    let Some(tokenizer) = sterna_fuzz::bounded(data.len(), 256, read) else {
        return;
    };
    for id in vocabulary.stop_ids(&tokenizer) {
        assert!((id as usize) < vocab_size);
    }
    if let Ok(ids) = tokenizer.encode(prompt, true) {
        assert!(ids.iter().all(|&id| (id as usize) < vocab_size));
        tokenizer.decode(&ids, true).expect("ids of the tokenizer's own");
    }
    if let Some(template) = ChatTemplate::from_gguf(&vocabulary, false) {
        // Whether it renders is its own affair.
        let _ = template.render(&[Message::new(Role::User, prompt)], true);
    }
});
