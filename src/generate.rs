//! Prompt in, text out: prefill, then decode · sample · detokenise, as an iterator.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use web_time::{Duration, Instant};

use crate::backend::{Device, HeadWork, LoadOptions, OnProgress};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::format::{Bytes, ModelFiles};
use crate::kv_cache::BLOCK;
use crate::model::{OnPrompt, Transformer};
use crate::sampler::{Sampler, Sampling};
use crate::session::{Identity, IdentityHash};
use crate::speculate::{Speculate, Speculation, SpeculationWork};
use crate::tokenizer::{
    ChatTemplate, DecodeStream, GgufVocabulary, Message, Source, Tokenizer, stop_ids,
};
use crate::wait::block_on;
use crate::weights::WeightSource;

/// A model that speaks: transformer, tokenizer, chat template and stop tokens.
///
/// It keeps the last text's keys and values: a prompt that begins like it, as the next turn of a chat
/// does, runs only from where it differs.
pub struct Model {
    label: String,
    identity: Identity,
    transformer: Transformer,
    tokenizer: Tokenizer,
    chat: Option<ChatTemplate>,
    stop_ids: Vec<u32>,
}

/// How a text is to be generated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerateOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Above 1 makes the tokens of prompt and text less likely to occur again; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Whether tokens are guessed ahead and checked together. The text is the same, but for rounding in
    /// the last bits where a device computes several tokens in another order than one.
    pub speculate: Speculate,
    /// What happens when the context is full.
    pub overflow: Overflow,
}

/// What happens when the context is full and there are tokens to generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// The text ends, with [`FinishReason::ContextFull`].
    #[default]
    Stop,
    /// The middle of the text is forgotten: the first 64 tokens stay (a quarter of the context, if that
    /// is less), and of the rest the newest, half a context in all. They are fed again, because keys
    /// are rotated by their positions and cannot be moved, and so the text goes on as after a fresh
    /// prompt of these tokens.
    Shift,
}

impl Overflow {
    /// The tokens that stay when `text` fills a context, for [`Overflow::Shift`].
    pub fn shifted(text: &[u32], capacity: usize) -> Vec<u32> {
        let first = BLOCK.min(capacity / 4).min(text.len());
        let (first, rest) = text.split_at(first);
        let newest = (capacity / 2).saturating_sub(first.len()).max(1).min(rest.len());
        [first, &rest[rest.len() - newest..]].concat()
    }
}

impl Default for GenerateOptions {
    /// 512 tokens, greedily, one a forward pass, and no more than the context holds.
    fn default() -> Self {
        Self {
            max_tokens: 512,
            sampling: Sampling::Greedy,
            repetition_penalty: 1.0,
            speculate: Speculate::Off,
            overflow: Overflow::Stop,
        }
    }
}

impl GenerateOptions {
    /// Checks every option's range, as generating does; for telling before a long load.
    ///
    /// # Errors
    /// [`Error::Sampling`] with the first option that is out of range.
    pub fn validate(&self) -> Result<()> {
        Sampler::new(self.sampling, self.repetition_penalty).map(|_| ())
    }
}

/// A model's way between text and tokens.
struct Language {
    tokenizer: Tokenizer,
    chat: Option<ChatTemplate>,
    stop_ids: Vec<u32>,
}

impl Language {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let vocab_size = checkpoint.config().vocab_size;
        if let Some(metadata) = checkpoint.files().metadata() {
            let vocabulary = GgufVocabulary::from_metadata(metadata)?;
            let tokenizer = Tokenizer::from_gguf(&vocabulary, vocab_size)?;
            let chat = ChatTemplate::from_gguf(&vocabulary, checkpoint.is_2b4t());
            let stop_ids = vocabulary.stop_ids(&tokenizer);
            return Ok(Self { tokenizer, chat, stop_ids });
        }
        let files = checkpoint.files();
        let tokenizer = SideFile::required(files, "tokenizer.json")?;
        let tokenizer = Tokenizer::from_json(tokenizer.source(), vocab_size)?;

        let tokenizer_config = SideFile::find(files, "tokenizer_config.json")?;
        let jinja = SideFile::find(files, "chat_template.jinja")?;
        let chat = ChatTemplate::from_files(
            tokenizer_config.as_ref().map(SideFile::source),
            jinja.as_ref().map(SideFile::source),
        )?;

        let config = SideFile::required(files, "config.json")?;
        let generation_config = SideFile::find(files, "generation_config.json")?;
        let configs = [Some(&config), generation_config.as_ref()];
        let configs: Vec<_> = configs.into_iter().flatten().map(SideFile::source).collect();
        let stop_ids = stop_ids(&tokenizer, &configs, vocab_size)?;
        Ok(Self { tokenizer, chat, stop_ids })
    }
}

impl Model {
    /// Loads a checkpoint directory with default [`LoadOptions`].
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`Model::from_checkpoint`].
    pub fn load(path: impl AsRef<Path>, device: Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(path.as_ref())?;
        Self::from_checkpoint(&checkpoint, device, &LoadOptions::default(), &mut |_| {})
    }

    /// Loads a checkpoint on a device, telling `progress` how far it has come.
    ///
    /// # Errors
    /// If there is no tokenizer, a side file is malformed or does not fit the model, the
    /// device is not there, or a tensor holds an invalid value.
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        device: Device,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        block_on(Self::from_checkpoint_async(checkpoint, device, options, progress))
    }

    /// [`Model::from_checkpoint`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Model::from_checkpoint`].
    pub async fn from_checkpoint_async(
        checkpoint: &Checkpoint,
        device: Device,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let language = Language::of(checkpoint)?;
        let transformer = Transformer::load_async(checkpoint, device, options, progress).await?;
        let label = checkpoint.files().label().to_owned();
        let mut identity = IdentityHash::new(checkpoint.config());
        identity.add(&checkpoint.identity()?.0);
        // Other numbers make other keys and values.
        identity.add(format!("{:?}", options.activations(checkpoint.config())?).as_bytes());
        let identity = identity.finish();
        let Language { tokenizer, chat, stop_ids } = language;
        Ok(Self { label, identity, transformer, tokenizer, chat, stop_ids })
    }

    /// What a user should know of how a checkpoint's texts are read, one line each: such as a chat
    /// template that is not the model's and was replaced.
    ///
    /// # Errors
    /// If a key of the tokenizer has a value of another type.
    pub fn notes(checkpoint: &Checkpoint) -> Result<Vec<String>> {
        match checkpoint.files().metadata() {
            Some(metadata) if GgufVocabulary::is_in(metadata) => {
                Ok(GgufVocabulary::from_metadata(metadata)?.notes(checkpoint.is_2b4t()))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// A text as tokens of a checkpoint's own tokenizer, without loading its weights.
    ///
    /// # Errors
    /// If there is no tokenizer, or it does not fit the model.
    pub fn encode(checkpoint: &Checkpoint, text: &str) -> Result<Vec<u32>> {
        let vocab_size = checkpoint.config().vocab_size;
        let tokenizer = match checkpoint.files().metadata() {
            Some(metadata) => {
                Tokenizer::from_gguf(&GgufVocabulary::from_metadata(metadata)?, vocab_size)?
            }
            None => {
                let tokenizer = SideFile::required(checkpoint.files(), "tokenizer.json")?;
                Tokenizer::from_json(tokenizer.source(), vocab_size)?
            }
        };
        tokenizer.encode(text, true)
    }

    /// The directory, or the name of the built-in model.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The network under the text.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// See [`Transformer::ready`].
    ///
    /// # Errors
    /// If the device has failed or was lost.
    pub async fn ready(&mut self) -> Result<()> {
        self.transformer.ready().await
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether it has a chat template, for [`Model::generate_chat`].
    pub fn has_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// The tokens that end a text, ascending.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Continues a text.
    ///
    /// # Errors
    /// As [`Model::generate_tokens`], or if the tokenizer cannot represent the text.
    pub fn generate(&mut self, prompt: &str, options: &GenerateOptions) -> Result<Generation<'_>> {
        let prompt = self.tokenizer.encode(prompt, true)?;
        self.generate_tokens(prompt, options)
    }

    /// Appends to the last text, or the one of [`Model::load_session`], and continues it.
    ///
    /// # Errors
    /// As for [`Model::generate`].
    pub fn append(&mut self, text: &str, options: &GenerateOptions) -> Result<Generation<'_>> {
        let mut prompt = self.transformer.session().tokens().to_vec();
        prompt.extend(self.tokenizer.encode(text, prompt.is_empty())?);
        self.generate_tokens(prompt, options)
    }

    /// Writes the last text with its keys and values to a file.
    ///
    /// # Errors
    /// As for [`Transformer::save`].
    pub fn save_session(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.transformer.save(path.as_ref(), &self.identity)
    }

    /// Makes the text in a file the last one, on whatever device it was made.
    ///
    /// # Errors
    /// As for [`Transformer::restore`]; then the last text is what it was.
    pub fn load_session(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let session = self.transformer.restore(path.as_ref(), &self.identity)?;
        let before = self.transformer.switch(session)?;
        self.transformer.close(before)
    }

    /// Answers the last message of a conversation, in the form of the model's own chat template.
    ///
    /// # Errors
    /// As [`Model::generate_tokens`], [`Error::NoChatTemplate`] if the model has none, or
    /// [`Error::ChatTemplate`] if it fails or refuses the messages.
    pub fn generate_chat(
        &mut self,
        messages: &[Message],
        options: &GenerateOptions,
    ) -> Result<Generation<'_>> {
        let no_template = || Error::NoChatTemplate { file: self.label.clone() };
        let text = self.chat.as_ref().ok_or_else(no_template)?.render(messages, true)?;
        let prompt = self.tokenizer.encode(&text, false)?;
        self.generate_tokens(prompt, options)
    }

    /// Continues a sequence of tokens. The prompt runs when the first piece is asked for.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::ContextOverflow`] if the prompt is longer than the context,
    /// or [`Error::Sampling`].
    pub fn generate_tokens(
        &mut self,
        prompt: Vec<u32>,
        options: &GenerateOptions,
    ) -> Result<Generation<'_>> {
        let (needed, capacity) = (prompt.len(), self.transformer.capacity());
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        let mut sampler = Sampler::new(options.sampling, options.repetition_penalty)?;
        sampler.observe(&prompt);
        let cached = self.transformer.resume(&prompt);
        self.transformer.choose_with(sampler)?;
        Ok(Generation {
            cached,
            is_prompted: false,
            overflow: options.overflow,
            stream: self.tokenizer.stream(&prompt)?,
            transformer: &mut self.transformer,
            stop_ids: &self.stop_ids,
            speculation: match options.speculate {
                Speculate::Off => None,
                Speculate::Prompt => Some(Speculation::new(&prompt)),
            },
            prompt,
            tokens: Vec::new(),
            max_tokens: options.max_tokens,
            finish_reason: (options.max_tokens == 0).then_some(FinishReason::Length),
            failed: false,
            prompt_time: Duration::ZERO,
            decode_time: Duration::ZERO,
        })
    }
}

/// A file beside the weights: how messages name it, and its contents.
struct SideFile {
    file: String,
    bytes: Bytes,
}

impl SideFile {
    fn find(files: &ModelFiles, name: &str) -> Result<Option<Self>> {
        let found = files.file(name)?;
        Ok(found.map(|bytes| Self { file: files.join(name), bytes }))
    }

    fn required(files: &ModelFiles, expected: &'static str) -> Result<Self> {
        let missing = || Error::NotACheckpoint { path: PathBuf::from(files.label()), expected };
        Self::find(files, expected)?.ok_or_else(missing)
    }

    fn source(&self) -> Source<'_> {
        Source { file: &self.file, bytes: &self.bytes }
    }
}

/// One token of a generated text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// The text that it completes: usually its own; nothing for a special token, or as long as a
    /// character lacks bytes.
    pub text: String,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose a stop token.
    Stop,
    /// All tokens asked for are there.
    Length,
    /// The context has no room for another token.
    ContextFull,
}

impl FinishReason {
    /// In one lower-case word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ContextFull => "context",
        }
    }
}

/// How long a text took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that the last text began with, so that they did not run again.
    pub cached_tokens: usize,
    /// From the start to the first generated token: the prompt's forward passes and one choice.
    pub time_to_first_token: Duration,
    /// Tokens generated, a stop token included.
    pub generated_tokens: usize,
    /// From the first generated token to the last.
    pub decode_time: Duration,
}

impl Timings {
    /// Prompt tokens that ran, a second; `None` before the first token.
    pub fn prompt_rate(&self) -> Option<f64> {
        let seconds = self.time_to_first_token.as_secs_f64();
        (seconds > 0.0).then(|| (self.prompt_tokens - self.cached_tokens) as f64 / seconds)
    }

    /// Generated tokens a second, the first one not counted; `None` before the second token.
    pub fn decode_rate(&self) -> Option<f64> {
        let seconds = self.decode_time.as_secs_f64();
        (seconds > 0.0).then(|| self.generated_tokens.saturating_sub(1) as f64 / seconds)
    }
}

/// A text in the making: an iterator over its tokens, which ends after a stop token, after
/// `max_tokens`, when the context is full, or after an error.
pub struct Generation<'a> {
    transformer: &'a mut Transformer,
    stop_ids: &'a [u32],
    speculation: Option<Speculation>,
    stream: DecodeStream<'a>,
    prompt: Vec<u32>,
    /// Tokens of the prompt that need not run.
    cached: usize,
    is_prompted: bool,
    overflow: Overflow,
    tokens: Vec<u32>,
    max_tokens: usize,
    finish_reason: Option<FinishReason>,
    failed: bool,
    prompt_time: Duration,
    decode_time: Duration,
}

impl Generation<'_> {
    /// The tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The tokens generated so far, a stop token included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Why the text ended; `None` as long as it has not.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// How the int8 head has worked since the model was loaded; `None` if there is none.
    pub fn head_work(&self) -> Option<HeadWork> {
        self.transformer.head_work()
    }

    /// How well guessing ahead has gone so far; `None` if it is off.
    pub fn speculation(&self) -> Option<SpeculationWork> {
        self.speculation.as_ref().map(Speculation::work)
    }

    /// How long it has taken so far.
    pub fn timings(&self) -> Timings {
        Timings {
            prompt_tokens: self.prompt.len(),
            cached_tokens: self.cached,
            time_to_first_token: self.prompt_time,
            generated_tokens: self.tokens.len(),
            decode_time: self.decode_time,
        }
    }

    /// [`Iterator::next`] where nothing may block. When the future is dropped, the piece is the next one
    /// all the same, or its prompt runs again.
    pub async fn next_async(&mut self) -> Option<Result<Piece>> {
        if self.failed || self.finish_reason.is_some() {
            return None;
        }
        let piece = self.advance().await;
        self.failed = piece.is_err();
        Some(piece)
    }

    async fn advance(&mut self) -> Result<Piece> {
        self.prefill_async(&mut |_, _| ControlFlow::Continue(())).await?;
        let start = Instant::now();
        let token = self.next_token().await?;
        let elapsed = start.elapsed();
        *if self.tokens.is_empty() { &mut self.prompt_time } else { &mut self.decode_time } +=
            elapsed;
        self.tokens.push(token);

        let is_stop = self.stop_ids.binary_search(&token).is_ok();
        self.finish_reason = if is_stop {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.max_tokens {
            Some(FinishReason::Length)
        } else if self.overflow == Overflow::Stop && self.is_full() {
            Some(FinishReason::ContextFull)
        } else {
            None
        };
        // A stop token is no part of the text, even where it is not marked as special.
        let mut text = if is_stop { String::new() } else { self.stream.push(token)? };
        if self.finish_reason.is_some() {
            text.push_str(&self.stream.flush()?);
        }
        Ok(Piece { token, text })
    }

    /// Runs the prompt, if that has not been done, telling `progress` how far it is; else the first
    /// piece does. After [`Error::Cancelled`] the text is over, or the prompt may run again.
    ///
    /// # Errors
    /// As for [`Transformer::prompt_with`].
    pub fn prefill(&mut self, progress: OnPrompt<'_>) -> Result<()> {
        block_on(self.prefill_async(progress))
    }

    /// [`Generation::prefill`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Generation::prefill`].
    pub async fn prefill_async(&mut self, progress: OnPrompt<'_>) -> Result<()> {
        if self.is_prompted || self.max_tokens == 0 {
            return Ok(());
        }
        let start = Instant::now();
        self.transformer.prompt_async(&self.prompt[self.cached..], progress).await?;
        self.prompt_time += start.elapsed();
        self.is_prompted = true;
        Ok(())
    }

    /// Takes the next token, after the prompt has run and there is room.
    async fn next_token(&mut self) -> Result<u32> {
        if !self.tokens.is_empty() && self.is_full() {
            let text = self.transformer.session().tokens();
            let kept = Overflow::shifted(text, self.transformer.capacity());
            let cached = self.transformer.resume(&kept);
            let mut progress = |_, _| ControlFlow::Continue(());
            self.transformer.prompt_async(&kept[cached..], &mut progress).await?;
        }
        let (last, left) = (self.tokens.last().copied(), self.max_tokens - self.tokens.len());
        let stop_ids = self.stop_ids;
        match &mut self.speculation {
            None => self.transformer.next_token_async(left).await,
            Some(speculation) => {
                let ends = |token| stop_ids.binary_search(&token).is_ok();
                speculation.next_token(self.transformer, last, left, ends)
            }
        }
    }

    /// Whether the context has no room for the last token.
    fn is_full(&self) -> bool {
        self.transformer.position() >= self.transformer.capacity()
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        block_on(async { self.next_async().await.transpose() }).transpose()
    }
}
