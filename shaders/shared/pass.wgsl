// What changes from one forward pass to the next; everything else is an override constant.
struct Pass {
    n_tokens: u32,        // M
    start: u32,           // position of the first token
    first_logit_row: u32, // first token whose logits are wanted
    n_logit_rows: u32,    // how many, up to the last token
    token_in: u32,        // where the first token's id is in the buffer of tokens
    token_out: u32,       // where the chosen token's id goes
    // How the next token is chosen: see sample.wgsl.
    uniform_: f32,        // the random number, in [0, 1)
    temperature: f32,     // 0: greedy
    penalty: f32,         // of repetition; 1: none
    top_k: u32,           // 0: all
    top_p: f32,           // 1: all
    min_p: f32,           // 0: all
    block: u32,           // block of the KV cache that holds position `start`
    first_block: u32,     // blocks of the sequence that a part of attention takes: see attention.wgsl
    end_block: u32,
}
