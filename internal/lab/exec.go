package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// environment is this process's, made to fit a node: lmctl is this lab's, and on
// a host it talks to that host's agent, and virsh to its libvirt.
func (l *Lab) environment(node string) []string {
	env := slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "LMCTL_AGENT=") || strings.HasPrefix(e, "LIBVIRT_") || strings.HasPrefix(e, "LMCTL_TLS=") ||
			strings.HasPrefix(e, "LMCTL_LAB=") || strings.HasPrefix(e, "PATH=") || strings.HasPrefix(e, "NOTIFY_SOCKET=")
	})
	env = append(env,
		"PATH="+filepath.Dir(l.state.Binary)+string(os.PathListSeparator)+os.Getenv("PATH"),
		"LMCTL_LAB="+l.dir,
		"LMCTL_TLS="+l.CertDir(Operator),
	)
	if node != Client {
		env = append(env, "LMCTL_AGENT="+l.AgentSocket(node))
	}
	if l.hasMounts(node) {
		env = append(env, "LIBVIRT_DEFAULT_URI="+LibvirtURI)
	}
	return env
}

// Start starts a command on a node: in its namespaces, with an environment in
// which lmctl is this lab's and talks to that host's agent. The command must
// not have been started; its own Env is added.
func (l *Lab) Start(node string, cmd *exec.Cmd) error {
	if err := l.isNode(node); err != nil {
		return err
	}
	cmd.Env = append(l.environment(node), cmd.Env...)
	// What was looked up in this process's PATH may not be what the node's
	// says.
	if name := cmd.Args[0]; name == "lmctl" {
		cmd.Path, cmd.Err = l.state.Binary, nil
	}
	if err := l.onNode(node, cmd.Start); err != nil {
		return fmt.Errorf("lab: on %s: %w", node, err)
	}
	return nil
}

// Exec replaces this program by a command on a node; see Start. It returns only
// if it cannot.
func (l *Lab) Exec(node string, argv []string) error {
	if err := l.isNode(node); err != nil {
		return err
	}
	env := l.environment(node)
	path := l.state.Binary
	if argv[0] != "lmctl" {
		var err error
		if path, err = exec.LookPath(argv[0]); err != nil {
			return fmt.Errorf("lab: on %s: %w", node, err)
		}
	}
	// The thread that does it brings its namespace along.
	return l.onNode(node, func() error {
		if err := unix.Exec(path, argv, env); err != nil {
			return fmt.Errorf("lab: on %s: %s: %w", node, path, err)
		}
		return nil
	})
}

// Output runs a command on a node and returns what it wrote to its standard
// output. When it fails the error has what it wrote to standard error.
func (l *Lab) Output(ctx context.Context, node string, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := l.Start(node, cmd); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return []byte(out.String()), fmt.Errorf("lab: on %s: %s: %w: %s", node, strings.Join(argv, " "), err, strings.TrimSpace(said.String()))
	}
	return []byte(out.String()), nil
}

// In runs f on a thread that is in a node's namespaces. Sockets and files that f
// opens belong to it and keep working afterwards; goroutines that f starts do
// not run there.
func (l *Lab) In(node string, f func() error) error {
	if err := l.isNode(node); err != nil {
		return err
	}
	return l.onNode(node, f)
}

// Dial connects from a node. The address must be numeric: a name would be
// looked up elsewhere.
func (l *Lab) Dial(ctx context.Context, node, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := l.In(node, func() error {
		// An address of one family only makes Go dial on this very thread.
		var d net.Dialer
		d.FallbackDelay = -1
		var err error
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: from %s: %w", node, err)
	}
	return conn, nil
}

func (l *Lab) isNode(node string) error {
	if slices.Contains(l.Nodes(), node) {
		return nil
	}
	return fmt.Errorf("lab: no such node: %q: there are %s", node, strings.Join(l.Nodes(), ", "))
}
