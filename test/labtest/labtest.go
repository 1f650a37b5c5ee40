// Package labtest is what tests have in common that move guests between the hosts
// of a lab.
package labtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/lab"
)

// Patience is how long a test waits for what must come. It is no measure of
// speed: machines that run tests are slow and shared.
const Patience = 60 * time.Second

// Build builds lmctl into a folder, with build tags like failpoint.
func Build(ctx context.Context, folder string, tags ...string) (binary string, err error) {
	binary = filepath.Join(folder, "lmctl")
	build := exec.CommandContext(ctx, "go", "build", "-tags", strings.Join(tags, ","), "-o", binary, "github.com/lmctl/lmctl/cmd/lmctl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build lmctl: %w: %s", err, out)
	}
	return binary, nil
}

// Cluster is a lab as one test uses it.
type Cluster struct {
	T       *testing.T
	Lab     *lab.Lab
	Clients map[string]*api.Client // by host
}

// Up makes a lab that lasts as long as the test. Its agents stop at failpoints, if
// they were built with them.
func Up(t *testing.T, o lab.Options) *Cluster {
	t.Helper()
	l, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Down(l); err != nil {
			t.Error(err)
		}
	})
	return Of(t, l)
}

// Start makes a lab that lasts until Down. Its agents stop at failpoints.
func Start(ctx context.Context, o lab.Options) (*lab.Lab, error) {
	if err := os.MkdirAll(failpoints(o.Dir), 0o700); err != nil {
		return nil, err
	}
	o.AgentEnv = append(o.AgentEnv, "LMCTL_FAILPOINTS="+failpoints(o.Dir))
	return lab.Up(ctx, o)
}

// Down ends what Start began.
func Down(l *lab.Lab) error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := lab.Down(ctx, l.Dir()); err != nil {
		return err // its mounts may still be there
	}
	return os.RemoveAll(failpoints(l.Dir()))
}

// Of gives a test a lab that others use too.
func Of(t *testing.T, l *lab.Lab) *Cluster {
	t.Helper()
	c := &Cluster{T: t, Lab: l, Clients: make(map[string]*api.Client)}
	for _, host := range l.Hosts() {
		client, err := api.Dial(api.Target{Socket: l.AgentSocket(host)})
		if err != nil {
			t.Fatal(err)
		}
		c.Clients[host] = client
		t.Cleanup(func() {
			if err := client.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	return c
}

// In is the cluster for a subtest.
func (c *Cluster) In(t *testing.T) *Cluster {
	sub := *c
	sub.T = t
	return &sub
}

// Showing is In for a subtest that shows the ends of the daemons' logs when it
// fails.
func (c *Cluster) Showing(t *testing.T) *Cluster {
	sub := c.In(t)
	t.Cleanup(func() {
		if t.Failed() {
			sub.showLogs()
		}
	})
	return sub
}

// logLines is how many lines of each log are shown.
const logLines = 60

func (c *Cluster) showLogs() {
	for _, host := range c.Lab.Hosts() {
		for _, d := range c.Lab.Daemons() {
			b, err := os.ReadFile(c.Lab.DaemonLog(host, d))
			if err != nil || len(b) == 0 {
				continue
			}
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			c.T.Logf("%s of %s:\n%s", d, host, strings.Join(lines[max(0, len(lines)-logLines):], "\n"))
		}
	}
}

// Context ends when a test has waited long enough, even for its cleaning up.
func (c *Cluster) Context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	c.T.Cleanup(cancel)
	return ctx
}

// Eventually waits for a condition that no event announces to a test.
func (c *Cluster) Eventually(what string, ok func() error) {
	c.T.Helper()
	if err := poll(ok); err != nil {
		c.T.Fatalf("%s: not within %v: %v", what, Patience, err)
	}
}

// pollEvery is between two looks at a condition.
const pollEvery = 5 * time.Millisecond

// poll looks until a condition holds, or patience is at its end: then it says what
// was wrong last. Most conditions are about several hosts, which have no event in
// common.
func poll(ok func() error) error {
	for deadline := time.Now().Add(Patience); ; time.Sleep(pollEvery) {
		if err := ok(); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
