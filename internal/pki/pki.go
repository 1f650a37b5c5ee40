// Package pki is the small certificate authority of a set of hosts, and the
// TLS that they speak among themselves and with their operators.
//
// [Init] makes an authority in a folder, [Issue] a certificate for a host or an
// operator, [Show] says what a certificate is for. An agent or a command
// [Load]s its own files and asks the [Identity] for a server's or a client's
// configuration: TLS 1.3 only, both sides authenticated.
//
// Who a peer is stands in the URI name of its certificate, lmctl://host/NAME or
// lmctl://operator/NAME, and nowhere else: a client that dials a host by its
// address asks for the host it means, by name. [Peer] reads it from a
// connection.
package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// The application protocols that an agent's one port speaks, chosen by ALPN.
const (
	// ALPNAPI is gRPC: for operators, and for agents among themselves.
	ALPNAPI = "h2"
	// ALPNMigrate is the migration data plane, for agents only.
	ALPNMigrate = "lmctl-migrate/1"
)

// Role is what the holder of a certificate may be.
type Role string

// The roles.
const (
	Host     Role = "host"     // an agent: data plane and Peer service
	Operator Role = "operator" // a person or a program that gives orders
)

// uriScheme is the scheme of the URI name that holds role and name.
const uriScheme = "lmctl"

// The ways in which a peer's certificate can be refused, for errors.Is.
var (
	ErrNoCertificate = errors.New("the peer showed no certificate")
	ErrWrongCA       = errors.New("the peer's certificate was not issued by our authority")
	ErrExpired       = errors.New("the peer's certificate is not valid now")
	ErrWrongRole     = errors.New("the peer's certificate is for another role")
	ErrWrongName     = errors.New("the peer is not the one that was expected")
	ErrNoIdentity    = errors.New("the peer's certificate names no lmctl role")
)

// namePattern holds for names of hosts and operators: they become file names,
// labels and parts of URIs, none of which is to need quoting.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)

// CheckName says why name cannot be the name of a host or an operator.
func CheckName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("pki: name %q: 1 to 63 letters, digits, dots, dashes and underscores, a letter or digit at both ends", name)
	}
	return nil
}

// ParseRole reads a role as the command line has it.
func ParseRole(s string) (Role, error) {
	switch r := Role(s); r {
	case Host, Operator:
		return r, nil
	}
	return "", fmt.Errorf("pki: role %q: must be host or operator", s)
}

// identityURI is the URI name of a certificate.
func identityURI(role Role, name string) *url.URL {
	return &url.URL{Scheme: uriScheme, Host: string(role), Path: "/" + name}
}

// Identify reads role and name from a certificate. It does not verify it.
func Identify(cert *x509.Certificate) (Role, string, error) {
	var found *url.URL
	for _, u := range cert.URIs {
		if u.Scheme != uriScheme {
			continue
		}
		if found != nil {
			return "", "", fmt.Errorf("%w: it has two: %s and %s", ErrNoIdentity, found, u)
		}
		found = u
	}
	if found == nil {
		return "", "", ErrNoIdentity
	}
	name := strings.TrimPrefix(found.Path, "/")
	role, err := ParseRole(found.Host)
	if err != nil || CheckName(name) != nil || *found != *identityURI(role, name) {
		return "", "", fmt.Errorf("%w: %s is not lmctl://host/NAME or lmctl://operator/NAME", ErrNoIdentity, found)
	}
	return role, name, nil
}
