//! The tokens that a backend chooses on the host, and which of them become text.

use crate::error::{Error, Result};
use crate::sampler::{Mark, Sampler, Sampling};

/// A sampler, and what the last pass chose with it.
#[derive(Default)]
pub(super) struct Choices {
    sampler: Sampler,
    /// The sampler before the last pass.
    start: Option<Mark>,
    chosen: Vec<u32>,
    taken: usize,
    /// Why there is no choice after those.
    failed: Option<Error>,
}

impl Choices {
    /// See [`super::Backend::choose_with`].
    pub(super) fn choose_with(&mut self, sampler: Sampler) {
        *self = Self { sampler, ..Self::default() };
    }

    /// Whether the next choices are the largest of the logits.
    pub(super) fn are_greedy(&self) -> bool {
        self.sampler.sampling() == Sampling::Greedy
    }

    /// The token that was chosen last.
    pub(super) fn last(&self) -> Result<u32> {
        self.chosen.last().copied().ok_or(Error::NoToken)
    }

    /// Chooses the token after a pass. `pick` makes the choice.
    pub(super) fn one(&mut self, pick: impl FnOnce(&mut Sampler) -> Result<u32>) -> Result<()> {
        self.clear();
        let token = pick(&mut self.sampler)?;
        self.chosen.push(token);
        Ok(())
    }

    /// Chooses a token after each of the pass's tokens, with those before it as text: `pick` makes the
    /// choice of a row. A row that has none counts only if it is asked for.
    pub(super) fn each(
        &mut self,
        tokens: &[u32],
        mut pick: impl FnMut(&mut Sampler, usize) -> Result<u32>,
    ) {
        self.clear();
        let start = self.sampler.mark();
        for row in 0..tokens.len() {
            self.sampler.rewind(&start);
            tokens[1..=row].iter().for_each(|&token| self.sampler.follow(token));
            match pick(&mut self.sampler, row) {
                Ok(token) => self.chosen.push(token),
                Err(error) => {
                    self.failed = Some(error);
                    break;
                }
            }
        }
        self.start = Some(start);
    }

    fn clear(&mut self) {
        self.chosen.clear();
        (self.start, self.taken, self.failed) = (None, 0, None);
    }

    /// The next token that was not taken. The only one of a pass can be taken again.
    pub(super) fn take(&mut self) -> Result<u32> {
        if self.start.is_none() {
            return self.last();
        }
        match self.chosen.get(self.taken) {
            Some(&token) => {
                self.taken += 1;
                Ok(token)
            }
            None => Err(self.failed.take().unwrap_or(Error::NoToken)),
        }
    }

    /// See [`super::Backend::keep`].
    pub(super) fn keep(&mut self, n: usize) -> Result<()> {
        let Some(start) = self.start.take_if(|_| (1..=self.taken).contains(&n)) else {
            return Err(Error::NoToken);
        };
        self.chosen.truncate(n);
        self.sampler.rewind(&start);
        self.chosen.iter().for_each(|&token| self.sampler.follow(token));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [0.3, 1.0, -0.5, 0.8, 0.9, 0.0, 0.1, 0.6];

    fn sampler() -> Sampler {
        let sampling =
            Sampling::Random { temperature: 1.3, top_k: None, top_p: 1.0, min_p: 0.0, seed: 3 };
        Sampler::new(sampling, 1.5).unwrap()
    }

    fn pick(sampler: &mut Sampler, _: usize) -> Result<u32> {
        sampler.sample(&mut LOGITS.to_vec(), 0)
    }

    /// The first tokens of the text that is chosen one by one.
    fn text(n: usize) -> Vec<u32> {
        let mut sampler = sampler();
        (0..n).map(|row| pick(&mut sampler, row).unwrap()).collect()
    }

    #[test]
    fn right_drafts_and_wrong_ones_lead_to_the_same_text() {
        let text = text(12);
        for right in 0..=3 {
            let mut choices = Choices::default();
            choices.choose_with(sampler());
            choices.one(|sampler| pick(sampler, 0)).unwrap();
            assert_eq!((choices.take().unwrap(), choices.take().unwrap()), (text[0], text[0]));
            let mut batch = text[..4].to_vec();
            batch[right + 1..].iter_mut().for_each(|token| *token ^= 7);
            choices.each(&batch, pick);
            let taken: Vec<u32> = (0..=right).map(|_| choices.take().unwrap()).collect();
            assert_eq!(taken, text[1..right + 2]);
            choices.keep(right + 1).unwrap();
            assert_eq!(choices.last().unwrap(), text[right + 1]);
            for &expected in &text[right + 2..] {
                choices.one(|sampler| pick(sampler, 0)).unwrap();
                assert_eq!(choices.take().unwrap(), expected, "{right} right");
            }
        }
    }

    #[test]
    fn only_what_was_taken_is_kept() {
        let mut choices = Choices::default();
        assert!(matches!(choices.keep(1), Err(Error::NoToken)));
        choices.each(&[1, 2, 3], pick);
        assert!(matches!(choices.keep(1), Err(Error::NoToken)));
        choices.take().unwrap();
        assert!(matches!(choices.keep(0), Err(Error::NoToken)));
        assert!(matches!(choices.keep(2), Err(Error::NoToken)));
        choices.keep(1).unwrap();
        assert!(matches!(choices.keep(1), Err(Error::NoToken)));
    }

    #[test]
    fn a_row_without_a_choice_is_an_error_when_it_is_asked_for() {
        let nan = |_: &mut Sampler, row| match row {
            2 => Err(Error::NanLogits { position: 7 }),
            row => Ok(row as u32),
        };
        let mut choices = Choices::default();
        choices.each(&[0; 4], nan);
        assert_eq!([choices.take().unwrap(), choices.take().unwrap()], [0, 1]);
        assert!(matches!(choices.take(), Err(Error::NanLogits { position: 7 })));
        choices.each(&[0; 4], nan);
        choices.take().unwrap();
        choices.keep(1).unwrap();
        assert_eq!(choices.take().unwrap(), 0);
    }
}
