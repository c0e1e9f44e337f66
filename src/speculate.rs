//! Prompt lookup: guesses how a text goes on from where the same tokens stood before, to be checked in
//! one forward pass (Saxena 2023, <https://github.com/apoorvumang/prompt-lookup-decoding>).
//!
//! A guess changes no text: the model chooses every token, and what differs from its choice is dropped.
//! It saves passes where a text repeats itself or its prompt, as in lists, code and quotations.

use std::collections::HashMap;

use crate::backend::MAX_DRAFT;
use crate::error::Result;
use crate::model::Transformer;

/// Whether tokens are guessed ahead of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Speculate {
    /// One token a forward pass.
    #[default]
    Off,
    /// By prompt lookup: the same text in fewer passes where it repeats itself.
    Prompt,
}

/// How well guessing went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpeculationWork {
    /// Tokens that were guessed and checked.
    pub proposed: u64,
    /// Those of them that were right, and are text.
    pub accepted: u64,
    /// Forward passes after the prompt's, each of which made a token and those that were accepted.
    pub passes: u64,
}

impl SpeculationWork {
    /// Tokens that a pass made, on average; `None` before the first.
    pub fn tokens_per_pass(&self) -> Option<f64> {
        let tokens = self.passes + self.accepted;
        (self.passes > 0).then(|| tokens as f64 / self.passes as f64)
    }
}

/// Tokens that are looked for, at most and at least. Longer ones find the right place of several; single
/// tokens recur by chance and are not worth their checks.
///
/// These numbers and those below were chosen by what they save on source files, prose, edited copies and
/// stories without repetition, where a pass takes 10 or 30 % longer for each token that it checks.
const LONGEST_GRAM: usize = 5;
const SHORTEST_GRAM: usize = 2;
/// Tokens of the first draft, and of one after a wrong one.
const FIRST_DRAFT: usize = 4;
const SHORTEST_DRAFT: usize = 1;
/// Steps without a draft after a wrong one, twice as many after each that follows it.
const FIRST_PAUSE: usize = 1;
const LONGEST_PAUSE: usize = 32;

/// The last tokens of a text, `u32::MAX` before them where they are fewer.
type Gram = [u32; LONGEST_GRAM];

/// A text with an index of what followed what, and how far its guesses are to be trusted.
#[derive(Debug, Clone)]
pub struct PromptLookup {
    text: Vec<u32>,
    /// Where the text went on after some tokens, the last time that they occurred before its end.
    after: HashMap<Gram, usize>,
    draft: Vec<u32>,
    /// Tokens of the next draft.
    len: usize,
    /// Steps without a draft after the last wrong one, and what is left of them.
    pause: usize,
    resting: usize,
}

impl Default for PromptLookup {
    /// An empty text.
    fn default() -> Self {
        Self {
            text: Vec::new(),
            after: HashMap::new(),
            draft: Vec::new(),
            len: FIRST_DRAFT,
            pause: 0,
            resting: 0,
        }
    }
}

impl PromptLookup {
    /// The text goes on with these tokens.
    pub fn extend(&mut self, tokens: &[u32]) {
        for &token in tokens {
            // Only now, so that a text's end is not found as its own earlier occurrence.
            let end = self.text.len();
            for gram in self.grams().into_iter().flatten() {
                self.after.insert(gram, end);
            }
            self.text.push(token);
        }
    }

    /// The last tokens, the most first; as many as there are.
    fn grams(&self) -> [Option<Gram>; LONGEST_GRAM + 1 - SHORTEST_GRAM] {
        std::array::from_fn(|shorter| {
            let n = LONGEST_GRAM - shorter;
            let last = &self.text[self.text.len().checked_sub(n)?..];
            let mut gram = [u32::MAX; LONGEST_GRAM];
            gram[shorter..].copy_from_slice(last);
            Some(gram)
        })
    }

    /// What may come next: at most `limit` tokens and [`MAX_DRAFT`], none where nothing is known or past
    /// guesses were wrong. [`PromptLookup::judge`] must be told of each draft what became of it.
    pub fn draft(&mut self, limit: usize) -> &[u32] {
        self.draft.clear();
        if self.resting > 0 {
            self.resting -= 1;
            return &self.draft;
        }
        let start = self.grams().into_iter().flatten().find_map(|gram| self.after.get(&gram));
        let Some(&start) = start else { return &self.draft };
        for at in start..start + self.len.min(limit) {
            // Past the end of the text the draft itself repeats.
            let token = match self.text.get(at) {
                Some(&token) => token,
                None => self.draft[at - self.text.len()],
            };
            self.draft.push(token);
        }
        &self.draft
    }

    /// How many tokens of the last draft, which was not empty, were right.
    pub fn judge(&mut self, accepted: usize) {
        let proposed = self.draft.len();
        if accepted == 0 {
            self.len = SHORTEST_DRAFT;
            self.pause = (2 * self.pause).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.resting = self.pause;
            return;
        }
        self.pause = 0;
        self.len = match accepted == proposed {
            true => self.len.max(2 * proposed).min(MAX_DRAFT),
            false => (accepted + 1).max(SHORTEST_DRAFT),
        };
    }
}

/// The text in the making, ahead of its reader.
pub(crate) struct Speculation {
    lookup: PromptLookup,
    work: SpeculationWork,
}

impl Speculation {
    /// Nothing ahead yet, after a prompt.
    pub(crate) fn new(prompt: &[u32]) -> Self {
        let mut lookup = PromptLookup::default();
        lookup.extend(prompt);
        Self { lookup, work: SpeculationWork::default() }
    }

    /// How well it went so far.
    pub(crate) fn work(&self) -> SpeculationWork {
        self.work
    }

    /// The token after `last`, `None` being the prompt's: one of at most `left`, unless a token `ends`
    /// the text.
    pub(crate) fn next_token(
        &mut self,
        transformer: &mut Transformer,
        last: Option<u32>,
        left: usize,
        ends: impl Fn(u32) -> bool,
    ) -> Result<u32> {
        if transformer.ahead() > 0 {
            return transformer.next_token(1);
        }
        let Some(last) = last else {
            let token = transformer.next_token(1)?;
            self.lookup.extend(&[token]);
            return Ok(token);
        };
        // The pass makes one token more than are accepted.
        let limit = transformer.draft_limit().min(left.saturating_sub(1));
        let draft = self.lookup.draft(limit);
        self.work.passes += 1;
        if draft.is_empty() {
            let token = transformer.next_token(1)?;
            self.lookup.extend(&[token]);
            return Ok(token);
        }
        let found = transformer.check_draft(last, draft, ends)?;
        let accepted = found.iter().zip(draft).filter(|(found, drafted)| found == drafted).count();
        self.work.proposed += draft.len() as u64;
        // The last token is the pass's own, where it does not end the text as it was drafted to.
        self.work.accepted += (found.len() - 1) as u64;
        self.lookup.judge(accepted);
        self.lookup.extend(&found);
        transformer.next_token(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// The text of a model whose choices are `expected` whatever it is asked: what comes out, and the work.
    fn follow(prompt: &[u32], expected: &[u32]) -> (Vec<u32>, SpeculationWork) {
        let mut lookup = PromptLookup::default();
        lookup.extend(prompt);
        let (mut text, mut work) = (Vec::new(), SpeculationWork::default());
        while text.len() < expected.len() {
            let rest = &expected[text.len()..];
            let draft = lookup.draft(rest.len() - 1);
            assert!(draft.len() < rest.len() && draft.len() <= MAX_DRAFT);
            let right =
                draft.iter().zip(rest).take_while(|(drafted, next)| drafted == next).count();
            work.passes += 1;
            work.proposed += draft.len() as u64;
            work.accepted += right as u64;
            if !draft.is_empty() {
                lookup.judge(right);
            }
            lookup.extend(&rest[..=right]);
            text.extend(&rest[..=right]);
        }
        (text, work)
    }

    fn noise(seed: u64, len: usize, vocab_size: usize) -> Vec<u32> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.below(vocab_size) as u32).collect()
    }

    /// The draft by the definition: the latest earlier occurrence of the most of the last tokens.
    fn plain_draft(text: &[u32], len: usize) -> Vec<u32> {
        for n in (SHORTEST_GRAM..=LONGEST_GRAM.min(text.len())).rev() {
            let last = &text[text.len() - n..];
            let starts = (n..text.len()).rev();
            if let Some(start) = starts.into_iter().find(|&start| text[start - n..start] == *last) {
                let period = text.len() - start;
                return (0..len).map(|i| text[start + i % period]).collect();
            }
        }
        Vec::new()
    }

    #[test]
    fn the_index_finds_what_a_search_finds() {
        for seed in 0..40 {
            let vocab_size = [1, 2, 3, 5, 20][seed as usize % 5];
            let text = noise(seed, 120, vocab_size);
            let mut lookup = PromptLookup::default();
            for end in 0..text.len() {
                let mut now = PromptLookup { len: MAX_DRAFT, resting: 0, ..lookup.clone() };
                let limit = end % (MAX_DRAFT + 2);
                let expected = plain_draft(&text[..end], limit.min(MAX_DRAFT));
                assert_eq!(now.draft(limit), expected, "seed {seed}, {end} tokens");
                lookup.extend(&text[end..=end]);
            }
        }
    }

    #[test]
    fn a_copied_text_takes_few_passes() {
        let prompt = noise(1, 200, 1000);
        // The prompt's second half again, after a word that says so.
        let mut expected = vec![5000];
        expected.extend(&prompt[98..]);
        let (text, work) = follow(&prompt, &expected);
        assert_eq!(text, expected);
        assert!(work.passes <= 20 && work.accepted >= 80, "{work:?}");
        assert!(work.accepted * 10 >= work.proposed * 9, "{work:?}");
        assert_eq!(work.passes + work.accepted, expected.len() as u64);
    }

    #[test]
    fn a_loop_is_followed_past_the_end_of_the_text() {
        for period in 1..=9 {
            let expected: Vec<u32> = (0..160).map(|i| i % period).collect();
            let (text, work) = follow(&[0, 1], &expected);
            assert_eq!(text, expected);
            assert!(work.passes <= 24 + 2 * u64::from(period), "period {period}: {work:?}");
        }
    }

    /// Guesses that are never right: how many tokens are checked in vain, for a token of text.
    #[test]
    fn wrong_guesses_become_rare() {
        // Every pair has occurred, and goes on as it never did.
        let mut lookup = PromptLookup::default();
        lookup.extend(&noise(2, 4000, 8));
        let mut random = Random::new(3);
        let (mut proposed, steps) = (0, 1000);
        for _ in 0..steps {
            let draft = lookup.draft(MAX_DRAFT);
            proposed += draft.len();
            let wrong = draft.first().map(|&first| (first + 1) % 8);
            if wrong.is_some() {
                lookup.judge(0);
            }
            lookup.extend(&[wrong.unwrap_or_else(|| random.below(8) as u32)]);
        }
        assert!((30..=40).contains(&proposed), "{proposed} of {steps}");
    }

    #[test]
    fn text_without_repetition_is_not_guessed() {
        let expected: Vec<u32> = (0..500).collect();
        let (text, work) = follow(&[600, 601], &expected);
        assert_eq!(text, expected);
        assert_eq!(work, SpeculationWork { proposed: 0, accepted: 0, passes: 500 });
        assert_eq!(work.tokens_per_pass(), Some(1.0));
        assert_eq!(SpeculationWork::default().tokens_per_pass(), None);
    }

    #[test]
    fn the_text_is_the_model_s_whatever_the_guesses() {
        for seed in 0..60 {
            let vocab_size = [1, 2, 4, 30][seed as usize % 4];
            let (prompt, expected) =
                (noise(seed, 30, vocab_size), noise(seed + 100, 150, vocab_size));
            let (text, work) = follow(&prompt, &expected);
            assert_eq!(text, expected);
            assert_eq!(work.passes + work.accepted, expected.len() as u64, "{work:?}");
            assert!(work.accepted <= work.proposed, "{work:?}");
        }
    }
}
