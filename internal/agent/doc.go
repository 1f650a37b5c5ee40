// Package agent is the daemon of a host: it keeps the host's guests, moves them
// to other hosts and takes those of others, and answers lmctl.
//
// [LoadConfig] reads its configuration, [New] puts the parts together, and
// [Agent.Run] serves until it is told to stop. The guests do not depend on it:
// when it ends they go on, and when it starts it adopts them and settles with
// its peers whatever it was interrupted in.
//
// Who may ask for what: root over the unix socket and holders of an operator's
// certificate may use Guests, Migrations and Hosts; another host's agent may
// use Peer and the migration data plane, and nothing else. One TCP port serves
// both, told apart by ALPN.
package agent
