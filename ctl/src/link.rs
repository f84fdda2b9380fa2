//! Connections to the host agent: one for calls, one for watches, one for each bulk stream.

use std::time::{Duration, Instant};

use sovereign_protocol::bulk::{self, Answer, Open};
use sovereign_protocol::codec;
use sovereign_protocol::event::{Events, Start};
use sovereign_protocol::handshake::{self, Channel, HandshakeError};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::limits::{BULK_OPEN, CALL, CALL_GRACE, IN_FLIGHT};
use sovereign_protocol::service::HostClient;
use sovereign_protocol::spec::HostSpec;
use sovereign_protocol::status::StatusReport;
use sovereign_protocol::transport::{self, Address, BoxStream, DialError};
use sovereign_protocol::v1::{Changes, Cursor, Document, Refusal};
use sovereign_reconcile::finding::FindingsView;
use sovereign_reconcile::finding::leftover::Removal;
use sovereign_reconcile::view::NetworkView;
use tarpc::client::RpcError;

use crate::error::{CommandError, Kind};

/// A look at the whole network: programs of iptables may have 10 s each.
const LOOK: Duration = Duration::from_secs(60);

/// A connection for calls.
pub(crate) struct Link {
    client: HostClient,
    /// The version of the agent at the other end.
    pub(crate) peer_agent: String,
}

impl Link {
    /// Connects to the host agent of an instance.
    ///
    /// # Errors
    /// `Unreachable` when none answers, `Refused` when it speaks another version.
    pub(crate) async fn connect(layout: &Layout) -> Result<Self, CommandError> {
        let (stream, peer_agent) = open(layout, Channel::Control).await?;
        let mut config = tarpc::client::Config::default();
        config.max_in_flight_requests = IN_FLIGHT;
        let client = HostClient::new(config, codec::transport(stream)).spawn();
        Ok(Self { client, peer_agent })
    }

    /// Connects, or `None` when nothing runs.
    ///
    /// # Errors
    /// As [`Link::connect`], but for an agent that is not there.
    pub(crate) async fn connect_if_running(layout: &Layout) -> Result<Option<Self>, CommandError> {
        let mut again = DYING;
        loop {
            match Self::connect(layout).await {
                Ok(link) => return Ok(Some(link)),
                Err(error) if error.reason == NOT_RUNNING => return Ok(None),
                // A socket of an agent that is just dying still takes connections.
                Err(error) if error.reason == CUT_OFF && again > 0 => {
                    again -= 1;
                    tokio::time::sleep(DYING_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Replaces the wanted state; returns its revision.
    ///
    /// # Errors
    /// `Refused` or `Configuration` by the agent, or the link's own.
    pub(crate) async fn apply(&self, spec: &HostSpec) -> Result<u64, CommandError> {
        let document = serde_json::to_vec(spec).map_err(|error| {
            CommandError::new(Kind::Internal, "Json", "cannot write the specification").because(error)
        })?;
        let answer = self.client.apply(context(CALL), Document::from(document));
        let applied = within("apply", CALL, answer)
            .await?
            .map_err(|refusal| refused("the specification", &refusal))?;
        Ok(applied.revision)
    }

    /// What is wanted now; `None` when nothing is.
    ///
    /// # Errors
    /// The link's own.
    pub(crate) async fn wanted(&self) -> Result<Option<HostSpec>, CommandError> {
        let document = within("wanted", CALL, self.client.wanted(context(CALL))).await?;
        if document.is_empty() {
            return Ok(None);
        }
        HostSpec::parse(&document).map(Some).map_err(|error| {
            CommandError::new(
                Kind::Internal,
                "Protocol",
                "the host agent's specification cannot be read",
            )
            .because(error)
        })
    }

    /// What changed after `cursor`, at the latest after `hold`.
    ///
    /// # Errors
    /// The link's own.
    pub(crate) async fn watch(
        &self,
        cursor: Option<Cursor>,
        hold: Duration,
    ) -> Result<Changes, CommandError> {
        let hold_ms = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
        let limit = hold + CALL;
        within("watch", limit, self.client.watch(context(limit), cursor, hold_ms)).await
    }

    /// What happened from `start` on, at the latest after `hold`.
    ///
    /// # Errors
    /// The link's own.
    pub(crate) async fn events(&self, start: Start, hold: Duration) -> Result<Events, CommandError> {
        let hold_ms = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
        let limit = hold + CALL;
        let answer = self.client.events(context(limit), start.into(), hold_ms);
        within("events", limit, answer).await.map(Into::into)
    }

    /// What is true now.
    ///
    /// # Errors
    /// The link's own.
    pub(crate) async fn status(&self) -> Result<StatusReport, CommandError> {
        let document = within("status", CALL, self.client.status(context(CALL))).await?;
        serde_json::from_slice(&document).map_err(|error| {
            CommandError::new(
                Kind::Internal,
                "Protocol",
                "the host agent's status cannot be read",
            )
            .because(error)
        })
    }

    /// What was last seen of the network; `None` when an agent of another build does not tell.
    ///
    /// # Errors
    /// The link's own.
    pub(crate) async fn network(&self) -> Result<Option<NetworkView>, CommandError> {
        let document = within("network", CALL, self.client.network(context(CALL))).await?;
        Ok(serde_json::from_slice(&document).ok())
    }

    /// What others did to the network, looked at anew.
    ///
    /// # Errors
    /// `Refused` when it cannot be looked at, or the link's own, also for an agent that does not know the question.
    pub(crate) async fn findings(&self) -> Result<FindingsView, CommandError> {
        let answer = within("findings", LOOK, self.client.findings(context(LOOK))).await?;
        let document = answer.map_err(|refusal| refused("the question for findings", &refusal))?;
        serde_json::from_slice(&document).map_err(|error| unreadable("findings").because(error))
    }

    /// Removes leftovers of scripts by name, or with `dry` tells what that would be.
    ///
    /// # Errors
    /// `Refused` with the names that there are, or the link's own.
    pub(crate) async fn remove_leftovers(
        &self,
        names: &[String],
        dry: bool,
    ) -> Result<Removal, CommandError> {
        let names = serde_json::to_vec(names).map_err(|error| unreadable("names").because(error))?;
        let answer = self
            .client
            .remove_leftovers(context(LOOK), Document::from(names), dry);
        let document = within("remove_leftovers", LOOK, answer)
            .await?
            .map_err(|refusal| refused("to remove anything", &refusal).next("sovereign doctor"))?;
        serde_json::from_slice(&document).map_err(|error| unreadable("removal").because(error))
    }

    /// Begins the orderly stop of all guests and the agent.
    ///
    /// # Errors
    /// `Refused` by the agent, or the link's own.
    pub(crate) async fn stop(&self) -> Result<(), CommandError> {
        let answer = within("stop", CALL, self.client.stop(context(CALL))).await?;
        answer.map_err(|refusal| refused("to stop", &refusal))
    }
}

/// The reason when the stream broke during the handshake.
const CUT_OFF: &str = "HandshakeFailed";
/// How often such a connection is tried again, and after which pause.
const DYING: u32 = 10;
const DYING_PAUSE: Duration = Duration::from_millis(50);
/// The reason when a connection broke after it was open.
pub(crate) const LOST: &str = "ConnectionLost";
/// The reason when nobody listens at the control socket.
pub(crate) const NOT_RUNNING: &str = "NotRunning";

/// Opens a bulk stream to a guest.
///
/// # Errors
/// `Refused` by host or guest agent, or the link's own.
pub(crate) async fn open_bulk(layout: &Layout, target: &Open) -> Result<BoxStream, CommandError> {
    let (mut stream, _) = open(layout, Channel::Bulk).await?;
    let limit = BULK_OPEN + CALL_GRACE; // the host agent asks the guest in turn
    let asked = async {
        bulk::write_message(&mut stream, target).await?;
        bulk::read_message::<Answer, _>(&mut stream).await
    };
    match tokio::time::timeout(limit, asked).await {
        Ok(Ok(Answer::Opened)) => Ok(stream),
        Ok(Ok(Answer::Refused { reason })) => {
            let message = format!("refused: {}", crate::context::escaped(&reason));
            Err(CommandError::new(Kind::Refused, "BulkRefused", message))
        }
        Ok(Err(error)) => Err(lost("the opening of a stream").because(error)),
        Err(_) => Err(late("the opening of a stream", limit)),
    }
}

async fn open(layout: &Layout, channel: Channel) -> Result<(BoxStream, String), CommandError> {
    let path = layout.control();
    let instance = &layout.instance;
    let mut stream = transport::dial(&Address::Unix { path })
        .await
        .map_err(|error| match error {
            DialError::Gone(_) => CommandError::new(
                Kind::Unreachable,
                NOT_RUNNING,
                format!(
                    "nothing runs as instance {instance:?}",
                    instance = instance.as_str()
                ),
            ),
            DialError::Timeout(_) => CommandError::new(
                Kind::TimedOut,
                "DialTimeout",
                "the host agent does not accept connections",
            )
            .because(error),
            error => CommandError::new(Kind::Unreachable, "DialFailed", "cannot reach the host agent")
                .because(error),
        })?;
    let shaken = handshake::dial(&mut stream, &layout.control_identity(), channel).await;
    let session = shaken.map_err(|error| {
        let (kind, reason) = match error {
            HandshakeError::Timeout => (Kind::TimedOut, "HandshakeTimeout"),
            HandshakeError::Version { .. } => (Kind::Refused, "VersionMismatch"),
            HandshakeError::WrongBoot { .. } | HandshakeError::WrongKey => (Kind::Refused, "WrongInstance"),
            _ => (Kind::Unreachable, CUT_OFF),
        };
        let message = format!(
            "the host agent at {} did not shake hands",
            layout.control().display()
        );
        CommandError::new(kind, reason, message).because(error)
    })?;
    Ok((stream, session.peer_agent))
}

fn context(limit: Duration) -> tarpc::context::Context {
    let mut context = tarpc::context::current();
    context.deadline = Instant::now() + limit;
    context
}

/// The outer timeout: after it the connection counts as dead, whatever the peer does.
async fn within<T>(
    what: &str,
    limit: Duration,
    call: impl Future<Output = Result<T, RpcError>>,
) -> Result<T, CommandError> {
    match tokio::time::timeout(limit + CALL_GRACE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(RpcError::DeadlineExceeded)) | Err(_) => Err(late(what, limit)),
        Ok(Err(error)) => Err(lost(what).because(error)),
    }
}

fn late(what: &str, limit: Duration) -> CommandError {
    let message = format!(
        "the host agent did not answer {what} within {} s",
        limit.as_secs()
    );
    CommandError::new(Kind::TimedOut, "CallTimeout", message)
}

fn lost(what: &str) -> CommandError {
    CommandError::new(
        Kind::Unreachable,
        LOST,
        format!("the host agent went away during {what}"),
    )
}

fn unreadable(what: &str) -> CommandError {
    let text = format!("the host agent's {what} cannot be read");
    CommandError::new(Kind::Internal, "Protocol", text)
}

fn refused(what: &str, refusal: &Refusal) -> CommandError {
    let (kind, reason) = match refusal {
        Refusal::Invalid(_) => (Kind::Configuration, "Invalid"),
        Refusal::Conflict(_) => (Kind::Refused, "Conflict"),
        Refusal::Failed(_) => (Kind::Refused, "Failed"),
    };
    let text = crate::context::escaped(&refusal.to_string());
    CommandError::new(kind, reason, format!("the host agent refused {what}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::name::Name;

    #[tokio::test(flavor = "current_thread")]
    async fn no_agent_a_silent_one_and_a_liar_are_typed_errors() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout {
            instance: Name::parse("t").unwrap(),
            run: dir.path().to_owned(),
            state: dir.path().to_owned(),
        };
        assert!(Link::connect_if_running(&layout).await.unwrap().is_none());
        let error = Link::connect(&layout).await.err().unwrap();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Unreachable, NOT_RUNNING)
        );

        let listener = tokio::net::UnixListener::bind(layout.control()).unwrap();
        let (error, _silent) =
            tokio::join!(Link::connect(&layout), async { listener.accept().await.unwrap() });
        assert_eq!(error.err().unwrap().reason, "HandshakeTimeout");

        let (error, ()) = tokio::join!(Link::connect(&layout), async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let other = Layout {
                instance: Name::parse("other").unwrap(),
                ..layout.clone()
            };
            let _ = handshake::accept(&mut stream, &other.control_identity()).await;
        });
        let error = error.err().unwrap();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Refused, "WrongInstance")
        );
    }
}
