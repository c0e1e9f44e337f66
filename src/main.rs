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
            fail(&format!("{error:#}"));
            let is_usage = matches!(
                error.downcast_ref(),
                Some(sterna::Error::Sampling { .. } | sterna::Error::UnknownDevice { .. })
            );
            ExitCode::from(if is_usage { USAGE } else { FAILED })
        }
        Err(_) => {
            let problem = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
            fail(&format!("this is a bug in sterna: {problem}"));
            ExitCode::from(FAILED)
        }
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
            fail(&format!("{}; see --help", problem.trim()));
            ExitCode::from(USAGE)
        }
    }
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
