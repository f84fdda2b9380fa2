//! Whether Miniflux answers in its own protocol: `GET /healthcheck`, which asks its database, says `OK`.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::core::service::Probe;
use crate::http::{self, HttpError, Reply};
use crate::log::chain;

/// A whole probe must end within this time: longer than Miniflux itself waits for a database that does not answer.
pub const PROBE: Duration = Duration::from_secs(5);
/// Characters of an answer that are told.
const TOLD_CHARS: usize = 200;

/// Asks, and tells what the answer means. Cancel safe.
pub async fn probe(address: SocketAddr) -> Probe {
    let asked = async {
        match TcpStream::connect(address).await {
            Ok(stream) => read(http::get(stream, "localhost", "/healthcheck").await),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                Probe::Refused(format!("{address}: {error}"))
            }
            Err(error) => Probe::Broken(format!("{address}: {error}")),
        }
    };
    let silent = || Probe::Silent(format!("no answer within {} s", PROBE.as_secs()));
    timeout(PROBE, asked).await.unwrap_or_else(|_| silent())
}

fn read(answer: Result<Reply, HttpError>) -> Probe {
    match answer {
        Ok(Reply { status: 200, body }) if body.trim_ascii() == b"OK" => {
            Probe::Ready("Miniflux: GET /healthcheck answered 200 OK".to_owned())
        }
        Ok(Reply { status, body }) => {
            let text = String::from_utf8_lossy(&body);
            let first: String = text.trim().chars().take(TOLD_CHARS).collect();
            Probe::Broken(format!("GET /healthcheck answered {status}: {first}"))
        }
        Err(error) => Probe::Broken(format!("GET /healthcheck: {}", chain(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server that takes a request and says this; without words it stays silent.
    async fn fake(answer: &'static str) -> Probe {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].starts_with(b"GET /healthcheck HTTP/1.1\r\n"));
            match answer {
                "" => std::future::pending().await,
                answer => stream.write_all(answer.as_bytes()).await.unwrap(),
            }
        };
        tokio::select! {
            found = probe(address) => found,
            () = async { served.await; std::future::pending().await } => unreachable!(),
        }
    }

    #[tokio::test]
    async fn only_the_right_answer_is_ready() {
        let good = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK";
        assert!(matches!(fake(good).await, Probe::Ready(_)));
        for (answer, why) in [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nHello",
                "answered 200: Hello",
            ),
            (
                "HTTP/1.1 500 X\r\nContent-Length: 26\r\n\r\nDatabase Connection Error\n",
                "answered 500: Database Connection Error",
            ),
            ("SSH-2.0-OpenSSH\r\n\r\n", "does not begin with HTTP/1.1"),
        ] {
            let Probe::Broken(text) = fake(answer).await else {
                panic!("{answer:?} is not broken")
            };
            assert!(text.contains(why), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_refusal_are_told_apart() {
        assert!(matches!(fake("").await, Probe::Silent(_)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(matches!(probe(address).await, Probe::Refused(_)));
    }
}
