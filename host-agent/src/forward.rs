//! A TCP port of the host that leads to a guest's loopback over vsock.
//!
//! The port is reserved (bound) at once, so that a conflict shows early, and *listens* only
//! while its guest is ready: without a listener the kernel refuses, it never completes a
//! connect for somebody who is not there. `shutdown(SHUT_RD)` un-listens and keeps the port;
//! the recipe and its traps are in FACTS section 11.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, bind, listen, shutdown, socket_with, sockopt,
};
use sovereign_protocol::bulk::{self, Answer, Open};
use sovereign_protocol::handshake::Channel;
use sovereign_protocol::limits::{BULK_OPEN, BULK_STREAMS};
use sovereign_protocol::port::{Taken, Transport};
use sovereign_protocol::spec::{self, Translated};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::link::{self, Target};

const BACKLOG: i32 = 128;

/// A reserved port that listens or refuses.
#[derive(Debug)]
pub struct Forward {
    socket: OwnedFd,
    /// The task that accepts, and the guest's port that it leads to.
    accepting: Option<(u16, JoinHandle<()>)>,
    streams: Streams,
}

/// The ports of a forward that the kernel translates: seen to be free, and while it is held nobody can bind the first
/// TCP port. A UDP port is not held: it would swallow what comes while the guest is away, and the sender would hear
/// nothing.
#[derive(Debug)]
pub struct Claim {
    listen: SocketAddr,
    translated: Option<Translated>,
    takes: Taken,
    _held: Option<Forward>,
}

impl Claim {
    /// Claims the ports.
    ///
    /// # Errors
    /// The first port that another program has.
    pub fn of(forward: &spec::Forward) -> Result<Self, (SocketAddr, io::Error)> {
        let mut held = None;
        let beyond = || (forward.listen, io::Error::from(io::ErrorKind::InvalidInput));
        let takes = forward.takes().ok_or_else(beyond)?; // refused with the document
        for port in takes.ports.first()..=takes.ports.last() {
            let address = SocketAddr::new(forward.listen.ip(), port);
            let one = match forward.transport() {
                Transport::Tcp => Forward::reserve(address).map(Some),
                Transport::Udp => unbound(address, SocketType::DGRAM)
                    .and_then(|socket| Ok(bind(&socket, &address)?))
                    .map(|()| None),
            };
            let one = one.map_err(|error| (address, error))?;
            held = held.or(one);
        }
        Ok(Self {
            listen: forward.listen,
            translated: forward.translated,
            takes,
            _held: held,
        })
    }

    /// What it takes of the host.
    #[must_use]
    pub fn takes(&self) -> Taken {
        self.takes
    }

    /// Whether it is the claim of this forward.
    #[must_use]
    pub fn is_of(&self, forward: &spec::Forward) -> bool {
        (self.listen, self.translated) == (forward.listen, forward.translated)
    }
}

/// A socket of an address's family alone: one of IPv6 that listens everywhere must not take the port of IPv4, which
/// is another forward's, or nobody's.
fn unbound(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match address {
        SocketAddr::V4(_) => Ok(socket_with(AddressFamily::INET, kind, flags, None)?),
        SocketAddr::V6(_) => {
            let socket = socket_with(AddressFamily::INET6, kind, flags, None)?;
            sockopt::set_ipv6_v6only(&socket, true)?;
            Ok(socket)
        }
    }
}

/// The connections of one forward; they outlive a pause of its listening.
#[derive(Debug, Clone)]
struct Streams {
    room: Arc<Semaphore>,
    ended: CancellationToken,
}

impl Forward {
    /// Reserves the port.
    ///
    /// # Errors
    /// `AddrInUse` when another program has it.
    pub fn reserve(address: SocketAddr) -> io::Result<Self> {
        let socket = unbound(address, SocketType::STREAM)?;
        if bind(&socket, &address).is_err() {
            // Connections of the last run may linger (TIME_WAIT). With SO_REUSEADDR only a socket that listens, or one
            // that did not set it, is still in the way; it is off again before anybody could share the port with us.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            bind(&socket, &address)?;
            sockopt::set_socket_reuseaddr(&socket, false)?;
        }
        Ok(Self {
            socket,
            accepting: None,
            streams: Streams {
                room: Arc::new(Semaphore::new(BULK_STREAMS)),
                ended: CancellationToken::new(),
            },
        })
    }

    /// Listens and carries each connection to `port` of the guest.
    ///
    /// # Errors
    /// The system's own.
    pub async fn open(&mut self, port: u16, target: watch::Receiver<Option<Target>>) -> io::Result<()> {
        match &self.accepting {
            Some((open, _)) if *open == port => return Ok(()),
            Some(_) => self.close().await?,
            None => {}
        }
        // While connections live, listening again needs SO_REUSEADDR; while un-listened it must be off.
        sockopt::set_socket_reuseaddr(&self.socket, true)?;
        listen(&self.socket, BACKLOG)?;
        let listener = TcpListener::from(self.socket.try_clone()?);
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let accepting = tokio::spawn(accept(listener, port, target, self.streams.clone()));
        self.accepting = Some((port, accepting));
        Ok(())
    }

    /// Refuses again; connections that live go on.
    ///
    /// # Errors
    /// The system's own.
    pub async fn close(&mut self) -> io::Result<()> {
        let Some((_, accepting)) = self.accepting.take() else {
            return Ok(());
        };
        accepting.abort();
        let _ = accepting.await; // a registered listener that is shut down would spin its thread
        shutdown(&self.socket, Shutdown::Read)?;
        sockopt::set_socket_reuseaddr(&self.socket, false)?;
        Ok(())
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        if let Some((_, accepting)) = self.accepting.take() {
            accepting.abort();
        }
        self.streams.ended.cancel();
    }
}

async fn accept(
    listener: tokio::net::TcpListener,
    port: u16,
    target: watch::Receiver<Option<Target>>,
    streams: Streams,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match streams.room.clone().try_acquire_owned() {
                Ok(place) => {
                    let (target, ended) = (target.borrow().clone(), streams.ended.clone());
                    tokio::spawn(async move {
                        ended.run_until_cancelled(carry(stream, port, target)).await;
                        drop(place);
                    });
                }
                Err(_) => reset(stream),
            },
            Err(error) => {
                tracing::warn!(%error, "a forward cannot accept");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn carry(mut stream: TcpStream, port: u16, target: Option<Target>) {
    let Some(target) = target else {
        return reset(stream);
    };
    let _ = stream.set_nodelay(true);
    let opened = tokio::time::timeout(BULK_OPEN, open(&target, &Open::Tcp { port })).await;
    let carried = match opened {
        Ok(Ok(guest)) => bulk::carry(&mut stream, guest).await,
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    if carried.is_err() {
        reset(stream); // the client sees a failure, never silence
    }
}

/// Opens a bulk stream in the guest.
///
/// # Errors
/// The link's, or `ConnectionRefused` with the guest's reason.
pub async fn open(target: &Target, what: &Open) -> io::Result<sovereign_protocol::transport::BoxStream> {
    let (mut stream, _) = link::open(target, Channel::Bulk)
        .await
        .map_err(io::Error::other)?;
    bulk::write_message(&mut stream, what).await?;
    match bulk::read_message(&mut stream).await? {
        Answer::Opened => Ok(stream),
        Answer::Refused { reason } => Err(io::Error::new(io::ErrorKind::ConnectionRefused, reason)),
    }
}

fn reset(stream: TcpStream) {
    let _ = sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reserved_port_refuses_listens_and_refuses_again() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut forward = Forward::reserve(free).unwrap();
        let connect = || std::net::TcpStream::connect(free);
        let (_sender, target) = watch::channel(None);
        for _ in 0..3 {
            assert_eq!(connect().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(
                Forward::reserve(free).unwrap_err().kind(),
                io::ErrorKind::AddrInUse
            );
            forward.open(5432, target.clone()).await.unwrap();
            let mut stream = TcpStream::connect(free).await.unwrap();
            let ended = tokio::io::AsyncReadExt::read(&mut stream, &mut [0]).await;
            assert_eq!(
                ended.unwrap_err().kind(),
                io::ErrorKind::ConnectionReset,
                "no guest: reset, not silence"
            );
            forward.close().await.unwrap();
        }
    }

    /// The same port of the other family is another forward's.
    #[test]
    fn a_port_of_ipv6_takes_none_of_ipv4() {
        let v4 = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let v6 = SocketAddr::from(([0u16; 8], port));
        let held = Forward::reserve(v6).unwrap();
        assert!(sockopt::ipv6_v6only(&held.socket).unwrap());
        drop((v4, held));
        for kind in [Transport::Tcp, Transport::Udp] {
            let forward = |ip: &str| spec::Forward {
                name: sovereign_protocol::name::Name::parse("db").unwrap(),
                service: None,
                listen: SocketAddr::new(ip.parse().unwrap(), port),
                port: 5432,
                translated: Some(Translated {
                    transport: kind,
                    more: 0,
                }),
            };
            let both = (Claim::of(&forward("::")), Claim::of(&forward("0.0.0.0")));
            assert!(both.0.is_ok() && both.1.is_ok(), "{kind}: {both:?}");
            assert!(kind == Transport::Udp || Claim::of(&forward("::")).is_err());
        }
    }

    #[test]
    fn a_port_whose_last_connections_linger_can_be_had_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        drop(server); // who closes first keeps the port in TIME_WAIT
        drop(client);
        drop(listener);
        let plain = socket_with(
            AddressFamily::INET,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        assert!(
            bind(&plain, &address).is_err(),
            "the port does not linger: this test shows nothing"
        );
        let first = Forward::reserve(address).unwrap();
        assert!(Forward::reserve(address).is_err(), "it is not shared");
        drop(first);
    }

    /// A forward of the kernel.
    fn translated(listen: SocketAddr, transport: Transport, more: u16) -> spec::Forward {
        spec::Forward {
            name: sovereign_protocol::name::Name::parse("x").unwrap(),
            service: None,
            listen,
            port: 80,
            translated: Some(Translated { transport, more }),
        }
    }

    #[test]
    fn claims_of_both_families_have_the_same_port_and_nobody_else_has() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let other = SocketAddr::from(([127, 0, 0, 1], free.port()));
        let free = SocketAddr::from(([0, 0, 0, 0], free.port()));
        let six = SocketAddr::from(([0u16; 8], free.port()));
        for transport in [Transport::Tcp, Transport::Udp] {
            let claim = |listen| Claim::of(&translated(listen, transport, 0));
            let (_four, _six) = (claim(free).unwrap(), claim(six).unwrap());
            let holds = transport == Transport::Tcp;
            assert_eq!(claim(free).is_err(), holds, "{transport} is held");
            assert_eq!(claim(six).is_err(), holds, "{transport} is held");
        }
        let other = std::net::UdpSocket::bind(other).unwrap();
        let (at, error) = Claim::of(&translated(free, Transport::Udp, 0)).unwrap_err();
        assert_eq!((at, error.kind()), (free, io::ErrorKind::AddrInUse));
        drop(other);
    }
}
