//! How what was done for a service came out.

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Log-in, query, not in recovery.
    Ready(String),
    /// It answers that it recovers or starts up.
    Recovering(String),
    /// Nobody listens.
    Refused(String),
    /// Nothing came back in time.
    Silent(String),
    /// It answered something else.
    Broken(String),
}

/// Why a launch failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Trying again cannot help: code and evidence.
    #[error("{1}")]
    Hopeless(&'static str, String),
    /// It may work next time.
    #[error("{0}")]
    Failed(String),
    /// Nothing ran that could be adopted, and nothing is started: what it needs of another guest cannot be used.
    #[error("it waits for another guest")]
    Waits,
    /// Nothing was started: what it needs of another guest does not answer. It is tried again for ever.
    #[error("{0}")]
    NotYet(String),
}

/// How an adjustment to the specification came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adjusted {
    /// All is as specified.
    Done,
    /// Some settings need a restart.
    Restart(String),
    /// It could not be done.
    Failed(String),
}

/// How far a service is with its specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It runs as specified.
    Reached,
    /// It is on its way.
    Pending,
    /// It does not run as specified; why.
    Failed(String),
}
