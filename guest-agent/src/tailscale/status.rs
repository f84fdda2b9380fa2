//! What tailscaled says of itself, and what that means. Pure.

use serde::Deserialize;
use sovereign_protocol::condition::Verdict;

/// The part of LocalAPI's `/localapi/v0/status` that is read; text of the daemon, not trusted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Its state, see [`judge`].
    pub backend_state: String,
    /// What it thinks is wrong; `null` when nothing is.
    pub health: Option<Vec<String>>,
    /// Its addresses in the tailnet.
    #[serde(rename = "TailscaleIPs")]
    pub addresses: Option<Vec<String>>,
}

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// There is no daemon in this image.
    NoProgram(String),
    /// Nobody listens.
    NobodyListens(String),
    /// Nothing came in time.
    Silent(String),
    /// It refused with this status.
    Refused(u16),
    /// What came is no status.
    Garbled(String),
    /// It answered.
    Status(Status),
}

/// Reads a body.
#[must_use]
pub fn parse(body: &[u8]) -> Answer {
    match serde_json::from_slice::<Status>(body) {
        Ok(status) if status.backend_state.is_empty() => {
            Answer::Garbled("the status names no BackendState".to_owned())
        }
        Ok(status) => Answer::Status(status),
        Err(error) => Answer::Garbled(format!("the status is not understood: {error}")),
    }
}

/// The condition of the backend, and that of its health while it runs.
#[must_use]
pub fn judge(answer: &Answer) -> (Verdict, Option<Verdict>) {
    match answer {
        Answer::NoProgram(text) => (Verdict::no("NotConfigured", text), None),
        Answer::NobodyListens(text) => (Verdict::no("DaemonDown", text), None),
        Answer::Silent(text) => (Verdict::unknown("Silent", text), None),
        Answer::Refused(status) => {
            let text = format!("tailscaled answers with HTTP status {status}");
            (Verdict::unknown("Refused", text), None)
        }
        Answer::Garbled(text) => (Verdict::unknown("Garbled", text), None),
        Answer::Status(status) => (backend(status), Some(health(status))),
    }
}

fn backend(status: &Status) -> Verdict {
    let (state, version) = (status.backend_state.as_str(), &status.version);
    let meaning = match state {
        "Running" => {
            let addresses = status.addresses.as_deref().unwrap_or_default().join(", ");
            return Verdict::yes(state, format!("tailscaled {version} runs as {addresses}"));
        }
        "NoState" => "has not read its state yet",
        "InUseOtherUser" => "is in use by another user",
        "NeedsLogin" => "needs a log-in",
        "NeedsMachineAuth" => "waits until an administrator approves this machine",
        "Stopped" => "is logged in and was stopped",
        "Starting" => "is logged in and connects",
        _ => {
            let text = format!("tailscaled {version} is in state {state:?}, which is not known here");
            return Verdict::unknown("UnknownState", text);
        }
    };
    Verdict::no(state, format!("tailscaled {version} {meaning}"))
}

fn health(status: &Status) -> Verdict {
    match status.health.as_deref().unwrap_or_default() {
        [] => Verdict::yes("Healthy", "tailscaled has no warning"),
        warnings => Verdict::no("Warned", warnings.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sovereign_protocol::condition::Status as Truth;

    fn judged(body: &str) -> (Verdict, Option<Verdict>) {
        judge(&parse(body.as_bytes()))
    }

    #[test]
    fn each_state_is_told_by_its_own_name_and_only_running_is_true() {
        for state in [
            "NoState",
            "InUseOtherUser",
            "NeedsLogin",
            "NeedsMachineAuth",
            "Stopped",
            "Starting",
        ] {
            let (backend, health) = judged(&format!(r#"{{"Version":"1.102.3","BackendState":"{state}"}}"#));
            assert_eq!((backend.status, backend.reason.as_str()), (Truth::False, state));
            assert_eq!(health.unwrap().status, Truth::True);
        }
        let (backend, _) = judged(
            r#"{"Version":"1.102.3","BackendState":"Running","TailscaleIPs":["100.64.0.2"],"Peer":{"x":[1,{}]}}"#,
        );
        assert_eq!(
            (backend.status, backend.evidence.as_str()),
            (Truth::True, "tailscaled 1.102.3 runs as 100.64.0.2")
        );
        let (backend, _) = judged(r#"{"BackendState":"Dreaming"}"#);
        assert_eq!(
            (backend.status, backend.reason.as_str()),
            (Truth::Unknown, "UnknownState")
        );
    }

    #[test]
    fn warnings_are_a_condition_of_their_own() {
        let (backend, health) =
            judged(r#"{"BackendState":"Running","Health":["IP forwarding is disabled","\u001b[2Jbad"]}"#);
        assert_eq!(backend.status, Truth::True);
        let health = health.unwrap();
        assert_eq!((health.status, health.reason.as_str()), (Truth::False, "Warned"));
        assert_eq!(health.evidence, "IP forwarding is disabled;  [2Jbad");
        let (_, health) = judged(r#"{"BackendState":"Running","Health":null}"#);
        assert_eq!(health.unwrap().reason, "Healthy");
    }

    #[test]
    fn what_is_no_status_is_unknown() {
        for body in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"BackendState":7}"#,
            "<html>",
            &"[".repeat(200_000),
        ] {
            let (backend, health) = judged(body);
            assert_eq!(
                (backend.status, backend.reason.as_str()),
                (Truth::Unknown, "Garbled")
            );
            assert_eq!(health, None);
        }
        assert_eq!(judge(&Answer::Refused(403)).0.reason, "Refused");
        assert_eq!(judge(&Answer::Silent(String::new())).0.status, Truth::Unknown);
        assert_eq!(
            judge(&Answer::NobodyListens(String::new())).0.status,
            Truth::False
        );
        assert_eq!(judge(&Answer::NoProgram(String::new())).0.status, Truth::False);
    }

    proptest! {
        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = judge(&parse(&body));
        }
    }
}
