//! The program `sterna`: arguments in, text out.
//!
//! Exit codes are chosen here and nowhere else: 0 fine, 1 failed, 2 wrong usage. A failure is one
//! line on standard error; a reader that closes the pipe is not a failure.

mod cli;

use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use clap::Parser;
use clap::error::ErrorKind;

const FAILED: u8 = 1;
const USAGE: u8 = 2;

/// What the last panic said.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    quiet_device_selection();
    let arguments = match cli::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        panic::set_hook(Box::new(|info| {
            *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
        }));
    }
    match panic::catch_unwind(AssertUnwindSafe(|| cli::run(arguments))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            fail(&explain(&error));
            let is_usage = matches!(
                error.downcast_ref(),
                Some(
                    sterna::Error::Sampling { .. }
                        | sterna::Error::UnknownDevice { .. }
                        | sterna::Error::HubRevision { .. }
                )
            ) || error.is::<cli::Usage>();
            ExitCode::from(if is_usage { USAGE } else { FAILED })
        }
        Err(_) => {
            let problem = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
            fail(&format!("this is a bug in sterna: {problem}"));
            ExitCode::from(FAILED)
        }
    }
}

/// Mesa's device-select layer writes to standard error where there is no session of a desktop. It
/// only reorders adapters, which this program orders itself.
#[expect(unsafe_code, reason = "setting an environment variable")]
fn quiet_device_selection() {
    const LAYER_OFF: &str = "NODEVICE_SELECT";
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() && std::env::var_os(LAYER_OFF).is_none() {
        // SAFETY: main has just begun and there is no other thread.
        unsafe { std::env::set_var(LAYER_OFF, "1") };
    }
}

/// Help goes out whole; a mistake as one line.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is no failure.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(USAGE)
        }
        _ => {
            let text = error.to_string();
            let problem = text.split("\nUsage:").next().unwrap_or(&text);
            let problem = problem.split("\nFor more information").next().unwrap_or(problem);
            let problem = problem.strip_prefix("error: ").unwrap_or(problem);
            let parts: Vec<&str> = problem.trim().split("\n\n").collect();
            fail(&format!("{}; see --help", parts.join("; ")));
            ExitCode::from(USAGE)
        }
    }
}

/// The error and its causes; most of the library's errors quote their cause already.
fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Prints the one line of a failure, whatever is in it.
fn fail(problem: &str) {
    let words: Vec<&str> = problem.split_whitespace().collect();
    // A name from a file may hold what a terminal would obey.
    let line = words.join(" ").replace(char::is_control, "\u{fffd}");
    // There is nowhere to report that standard error is closed.
    let _ = writeln!(io::stderr(), "error: {line}");
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    })
}
