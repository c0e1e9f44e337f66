//! Chat templates: messages → the text that the model was trained on.
//!
//! A template is a Jinja program that comes with the model; it runs as Hugging Face `transformers`
//! runs it (`utils/chat_template_utils.py`), with a limit on its steps.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Output, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{GgufVocabulary, Source};
use crate::error::{Error, Result};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message from its parts.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// How BitNet b1.58 2B4T was trained to talk (`tokenizer_config.json` of the original checkpoint).
const BITNET_2B4T: &str = "{{ bos_token }}{% for message in messages %}\
    {{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// Steps that a template may take: thousands of times more than any in the wild needs.
const FUEL: u64 = 10_000_000;

/// The longest text that a template may write: far more than any context holds.
///
/// That bounds the text, and what `{{ … }}` writes into variables and macros. The engine has no
/// bound for a string that an expression makes (`x ~ x`, `x | replace(…)`), nor for plain template
/// text inside `{% set %}…{% endset %}`: a hostile template can still exhaust memory with those.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// A model's own chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    file: String,
    template: String,
    /// `bos_token`, `eos_token` and their like.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template of a model: `chat_template.jinja` if there is one, else `chat_template` of
    /// `tokenizer_config.json`, which is a string or a list of `{name, template}`, of which
    /// `default` is taken. `None` if the model has none.
    ///
    /// # Errors
    /// [`Error::Json`] or [`Error::Tokenizer`] if a file is malformed. Whether the template
    /// compiles shows when it is rendered: a model with a bad one can still complete plain text.
    pub fn from_files(
        tokenizer_config: Option<Source<'_>>,
        jinja: Option<Source<'_>>,
    ) -> Result<Option<Self>> {
        let config = tokenizer_config.map(|source| source.json()).transpose()?;
        let config = config.unwrap_or_default();
        let (file, template) = match (jinja, tokenizer_config) {
            (Some(jinja), _) => match std::str::from_utf8(jinja.bytes) {
                Ok(template) => (jinja.file, Some(template)),
                Err(error) => return Err(malformed(jinja.file, &error.to_string())),
            },
            (None, Some(source)) => (source.file, template_of(source.file, &config)?),
            (None, None) => return Ok(None),
        };
        Ok(template.map(|template| Self {
            file: file.to_owned(),
            template: template.to_owned(),
            special_tokens: special_tokens(&config),
        }))
    }

    /// The template of a GGUF file; `None` if it has none. Instead of the placeholder that
    /// bitnet.cpp writes into BitNet b1.58 2B4T, the template of the original checkpoint, which
    /// [`GgufVocabulary::notes`] tells.
    ///
    /// `is_2b4t`: whether the file has that model's dimensions; its own architecture,
    /// `bitnet-b1.58`, is known without. A template that is not the placeholder is always kept.
    pub fn from_gguf(vocabulary: &GgufVocabulary, is_2b4t: bool) -> Option<Self> {
        let template = vocabulary.chat_template.as_deref()?;
        let is_wrong = vocabulary.has_wrong_template(is_2b4t);
        Some(Self {
            file: vocabulary.file.clone(),
            template: if is_wrong { BITNET_2B4T } else { template }.to_owned(),
            special_tokens: vocabulary.special_tokens(),
        })
    }

    /// The Jinja program.
    pub(super) fn into_template(self) -> String {
        self.template
    }

    /// The text of a conversation; with `add_generation_prompt`, it ends where the assistant's
    /// answer begins. Encode it without adding special tokens: the template has written them.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if the template is invalid, refuses the messages
    /// (`raise_exception`), does not end, or writes more than 16 MiB.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let render = || {
            let environment = environment()?;
            let variables = context! {
                messages => Serde(messages),
                add_generation_prompt,
                // Templates ask for `tools is not none`.
                tools => (),
                documents => (),
                ..minijinja::Value::from(Serde(&self.special_tokens))
            };
            let mut text = Vec::new();
            let output = Limited { inner: &mut text, left: MAX_TEXT_BYTES };
            environment.template_from_str(&self.template)?.render_captured_to(variables, output)?;
            String::from_utf8(text)
                .map_err(|error| minijinja::Error::new(ErrorKind::WriteFailure, error.to_string()))
        };
        render().map_err(|source| Error::ChatTemplate { file: self.file.clone(), source })
    }
}

fn malformed(file: &str, problem: &str) -> Error {
    Error::Tokenizer { file: file.to_owned(), problem: format!("chat template: {problem}") }
}

/// `chat_template` of `tokenizer_config.json`.
fn template_of<'a>(file: &str, config: &'a Value) -> Result<Option<&'a str>> {
    let expected = "expected a string or a list of {name, template}";
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template)),
        Some(Value::Array(list)) => {
            for entry in list {
                let field = |key| entry.get(key).and_then(Value::as_str);
                let name = field("name").ok_or_else(|| malformed(file, expected))?;
                let template = field("template").ok_or_else(|| malformed(file, expected))?;
                if name == "default" {
                    return Ok(Some(template));
                }
            }
            Ok(None)
        }
        Some(_) => Err(malformed(file, expected)),
    }
}

/// Every `…_token` that is a string or a `{content}` object.
pub(super) fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    let entries = config.as_object().into_iter().flatten();
    let tokens = entries.filter(|(key, _)| key.ends_with("_token"));
    let text = |value: &Value| {
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    tokens.filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect()
}

/// Jinja as `transformers` sets it up.
fn environment() -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    let written = AtomicUsize::new(0);
    environment.set_formatter(move |output, _, value| {
        // Nothing is escaped, whatever the template says.
        write!(Counted { output, written: &written }, "{value}").map_err(|_| too_long())
    });
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| {
        Err::<(), _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        jiff::fmt::strtime::format(format, &jiff::Zoned::now())
            .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

fn too_long() -> minijinja::Error {
    let problem = format!("it writes more than {MAX_TEXT_BYTES} bytes");
    minijinja::Error::new(ErrorKind::InvalidOperation, problem)
}

/// The text of a template, up to a length.
struct Limited<'a> {
    inner: &'a mut Vec<u8>,
    left: usize,
}

impl io::Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left =
            self.left.checked_sub(bytes.len()).ok_or_else(|| io::Error::other(too_long()))?;
        self.inner.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `{{ … }}` writes, be it to the text or into a variable or macro: up to a length in all.
struct Counted<'a, 'o> {
    output: &'a mut Output<'o>,
    written: &'a AtomicUsize,
}

impl fmt::Write for Counted<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let before = self.written.fetch_add(text.len(), Ordering::Relaxed);
        if before.saturating_add(text.len()) > MAX_TEXT_BYTES {
            return Err(fmt::Error);
        }
        self.output.write_str(text)
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`; the engine's own filter escapes
/// for HTML.
fn to_json(
    value: minijinja::Value,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<minijinja::Value> = options.get("ensure_ascii")?;
    let _: Option<minijinja::Value> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let mut json = Vec::new();
    let result = match indent {
        Some(indent) => {
            let indent = vec![b' '; indent.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, PythonFormatter))
        }
    };
    let bad = |error: String| minijinja::Error::new(ErrorKind::BadSerialization, error);
    result.map_err(|error| bad(error.to_string()))?;
    String::from_utf8(json).map_err(|error| bad(error.to_string()))
}

/// JSON with a space after `,` and `:`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{CONFIG, golden, source, tokenizer};
    use super::*;

    fn render(template: &str) -> Result<String> {
        let config = serde_json::json!({
            "chat_template": template,
            "bos_token": { "content": "<s>", "special": true },
            "eos_token": "</s>",
            "pad_token": null,
        });
        let config = serde_json::to_vec(&config).unwrap();
        let chat = ChatTemplate::from_files(Some(source(&config)), None)?.unwrap();
        let messages =
            [Message::new(Role::System, "Be <b>\"brief\"</b>."), Message::new(Role::User, " Hé! ")];
        chat.render(&messages, true)
    }

    #[test]
    fn the_golden_chat_is_equal() {
        let chat = ChatTemplate::from_files(Some(source(CONFIG)), None).unwrap().unwrap();
        let golden = golden().chat;
        assert_eq!(chat.render(&golden.messages, false).unwrap(), golden.rendered_no_gen);
        let rendered = chat.render(&golden.messages, true).unwrap();
        assert_eq!(rendered, golden.rendered);
        assert_eq!(tokenizer().encode(&rendered, false).unwrap(), golden.ids);
    }

    #[test]
    fn templates_run_as_in_transformers() {
        for (template, expected) in [
            ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ no_token }}", "<s>|</s>||"),
            // Block tags leave no whitespace, expressions leave theirs.
            ("  {% if true %}\n  x\n  {% endif %}\n{{ 1 }}\n", "  x\n1"),
            ("{{ messages[0]['content'] }}", "Be <b>\"brief\"</b>."),
            ("{{ messages[1:][0].content.strip().upper() }}", "HÉ!"),
            ("{{ messages[-1]['content'] | trim + '|' }}", "Hé!|"),
            ("{% if tools is not none %}tools{% endif %}{{ add_generation_prompt }}", "True"),
            (
                "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
                "user",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            (
                "{{ messages[0] | tojson }}",
                r#"{"role": "system", "content": "Be <b>\"brief\"</b>."}"#,
            ),
            ("{{ [1, 'é'] | tojson(indent=2) }}", "[\n  1,\n  \"é\"\n]"),
        ] {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
        assert_eq!(render("{{ strftime_now('%Y') }}").unwrap().len(), 4);
    }

    #[test]
    fn templates_may_refuse() {
        let error = render("{{ raise_exception('no system role') }}").unwrap_err();
        assert!(error.to_string().contains("no system role"), "{error}");
    }

    #[test]
    fn a_file_of_its_own_comes_first() {
        let jinja = source(b"{{ bos_token }}!");
        let chat = ChatTemplate::from_files(Some(source(CONFIG)), Some(jinja)).unwrap().unwrap();
        assert_eq!(chat.render(&[], true).unwrap(), "<|begin_of_text|>!");
        let chat = ChatTemplate::from_files(None, Some(source(b"x"))).unwrap().unwrap();
        assert_eq!(chat.render(&[], true).unwrap(), "x");
        assert!(ChatTemplate::from_files(None, Some(source(b"\xff"))).is_err());
    }

    #[test]
    fn a_list_has_a_default() {
        let chat = |json: &str| ChatTemplate::from_files(Some(source(json.as_bytes())), None);
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"},
                       {"name": "default", "template": "d"}]}"#;
        assert_eq!(chat(list).unwrap().unwrap().render(&[], true).unwrap(), "d");
        for none in ["{}", r#"{"chat_template": null}"#, r#"{"chat_template": []}"#, "[]", "1"] {
            assert!(chat(none).unwrap().is_none(), "{none}");
        }
        for bad in [r#"{"chat_template": 1}"#, r#"{"chat_template": [{}]}"#, "", "{"] {
            assert!(chat(bad).is_err(), "{bad}");
        }
        assert!(ChatTemplate::from_files(None, None).unwrap().is_none());
    }

    #[test]
    fn hostile_templates_are_errors() {
        let nested = "{% if true %}".repeat(10_000);
        let parens = "{{ ".to_owned() + &"(".repeat(10_000);
        for template in [
            "{% for m in messages %}",
            "{{ messages.content.x }}",
            "{{ nothing() }}",
            "{{ strftime_now('%') }}",
            "{{ 1 / 0 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "{{ 'x' * 9999999999999 }}",
            "{% include 'chat' %}",
            // Each writes terabytes.
            "{% for i in range(99999) %}{{ 'x' * 99999999 }}{% endfor %}",
            "{% set x = 'x' * 10000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
            &format!("{{% for i in range(99999) %}}{}{{% endfor %}}", "x".repeat(100_000)),
            "{% set x = 'xx' %}{% set ns = namespace(x=x) %}{% for i in range(50) %}\
             {% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
            "{% set ns = namespace(x='xx') %}{% for i in range(50) %}\
             {% set y %}{{ [ns.x, ns.x] }}{% endset %}{% set ns.x = y %}{% endfor %}",
            &nested,
            &parens,
        ] {
            let error = render(template).unwrap_err();
            let name = template.chars().take(50).collect::<String>();
            assert!(matches!(error, Error::ChatTemplate { .. }), "{name}: {error}");
        }
    }
}
