// What changes from one forward pass to the next; everything else is an override constant.
struct Pass {
    n_tokens: u32,        // M
    start: u32,           // position of the first token
    first_logit_row: u32, // first token whose logits are wanted
    n_logit_rows: u32,    // how many, up to the last token
}
