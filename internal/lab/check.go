package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/guest/flat"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
)

// Verdict is what a guest's own checks say.
type Verdict struct {
	Guest    string   `json:"guest"`
	Host     string   `json:"host"`     // where it runs
	OK       bool     `json:"ok"`       // whole, and going on
	Problems []string `json:"problems"` // why not
	// Counter goes up as long as the guest goes on: a flat guest's counter, a
	// Linux guest's ticks.
	Counter uint64          `json:"counter"`
	Linux   *control.Status `json:"linux,omitempty"`
}

// notOnOneHost says that a guest does not run on exactly one host.
type notOnOneHost struct {
	guest string
	at    []string // the hosts that run it
	seen  []string // what the hosts say of it, in words
}

func (e *notOnOneHost) Error() string { return "lab: guest " + e.guest + ": " + e.where() }

func (e *notOnOneHost) where() string {
	words := "runs on no host"
	if len(e.at) > 0 {
		words = "runs on " + strings.Join(e.at, " and ")
	}
	if len(e.seen) == 0 {
		return words + " (no host has it)"
	}
	return words + " (" + strings.Join(e.seen, ", ") + ")"
}

// Locate returns the host on which a guest runs, as the agents that run say.
// A guest that runs on two hosts, or on none, is an error.
func (l *Lab) Locate(ctx context.Context, name string) (string, error) {
	var at, seen []string
	for _, host := range l.Hosts() {
		states, err := l.states(ctx, host)
		if errors.Is(err, errNotRunning) {
			seen = append(seen, "no agent on "+host)
			continue
		}
		if err != nil {
			return "", err
		}
		state, ok := states[name]
		if !ok {
			continue
		}
		seen = append(seen, state+" on "+host)
		if state == "running" || state == "migrating" {
			at = append(at, host)
		}
	}
	if len(at) != 1 {
		return "", &notOnOneHost{guest: name, at: at, seen: seen}
	}
	return at[0], nil
}

// states are the states of a host's guests: as its agent says or, if that does
// not run, its libvirt. The error is errNotRunning if there is neither.
func (l *Lab) states(ctx context.Context, host string) (map[string]string, error) {
	runs, err := l.AgentRuns(host)
	if err != nil {
		return nil, err
	}
	if !runs {
		if l.Hypervisor() == Libvirt {
			if runs, err = l.DaemonRuns(host, Libvirtd); err != nil {
				return nil, err
			}
		}
		if !runs {
			return nil, errNotRunning
		}
		return l.domainStates(ctx, host)
	}
	states := make(map[string]string)
	err = l.WithAgent(host, func(c *api.Client) error {
		list, err := c.Guests.List(ctx, &lmctlv1.ListGuestsRequest{})
		if err != nil {
			return err
		}
		for _, g := range list.Guests {
			states[g.Name] = g.State
		}
		return nil
	})
	return states, err
}

// CheckGuest asks a guest, wherever it runs, to check all of its memory, and
// sees that it goes on. The error is about the asking; what the guest says is in
// the verdict.
func (l *Lab) CheckGuest(ctx context.Context, name string) (Verdict, error) {
	g, err := l.Guest(name)
	if err != nil {
		return Verdict{}, err
	}
	host, err := l.Locate(ctx, name)
	if err != nil {
		return Verdict{Guest: name, Problems: []string{err.Error()}}, err
	}
	v := Verdict{Guest: name, Host: host, Problems: []string{}}
	if g.Kind == Flat {
		err = l.checkFlat(ctx, g, &v)
	} else {
		err = l.checkLinux(ctx, g, &v)
	}
	v.OK = err == nil && len(v.Problems) == 0
	return v, err
}

// patience is how long a guest may take to go on, at least: with an emulated
// CPU and a busy host it may take long.
const patience = 20 * time.Second

func (l *Lab) checkFlat(ctx context.Context, g Guest, v *Verdict) error {
	f, err := l.OpenMemory(v.Host, g)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := g.flatConfig().Check(f, false)
	v.Counter = st.Counter
	if err != nil {
		v.Problems = append(v.Problems, err.Error())
		return nil
	}
	return goesOn(ctx, v, func() (uint64, error) {
		st, err := flat.ReadState(f)
		return st.Counter, err
	})
}

// goesOn waits until a counter is beyond what the verdict has.
func goesOn(ctx context.Context, v *Verdict, counter func() (uint64, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		n, err := counter()
		if err != nil {
			return err
		}
		if n > v.Counter {
			v.Counter = n
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			v.Problems = append(v.Problems, fmt.Sprintf("its counter stands still at %d", n))
			return nil
		}
	}
}

func (l *Lab) checkLinux(ctx context.Context, g Guest, v *Verdict) error {
	c, err := l.Control(ctx, g)
	if err != nil {
		return err
	}
	defer c.Close()
	st, err := c.Do(ctx, control.Request{Do: control.CheckAll})
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	v.Linux, v.Counter = &st, st.Clock.Ticks
	v.Problems = slices.Clone(st.Problems)
	return goesOn(ctx, v, func() (uint64, error) {
		st, err := c.Do(ctx, control.Request{Do: control.GetStatus})
		return st.Clock.Ticks, err
	})
}

// Control connects to a Linux guest's control port from the client.
func (l *Lab) Control(ctx context.Context, g Guest) (*control.Client, error) {
	conn, err := l.DialGuest(ctx, g, "tcp", control.ControlPort)
	if err != nil {
		return nil, err
	}
	return control.NewClient(conn), nil
}

// DialGuest connects to a port of a Linux guest from the client.
func (l *Lab) DialGuest(ctx context.Context, g Guest, network string, port int) (net.Conn, error) {
	if g.Kind != Linux {
		return nil, fmt.Errorf("lab: guest %s has no network", g.Name)
	}
	return l.Dial(ctx, Client, network, net.JoinHostPort(g.Addresses()[0].Addr().String(), strconv.Itoa(port)))
}

// TickOffset is where in a guest's memory file a 32-bit word is that goes up as
// long as the guest goes on: for flat.Probe.
func (l *Lab) TickOffset(ctx context.Context, g Guest) (int64, error) {
	if g.Kind == Flat {
		return flat.CounterAddr, nil
	}
	c, err := l.Control(ctx, g)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	st, err := c.Do(ctx, control.Request{Do: control.GetStatus})
	if err != nil {
		return 0, fmt.Errorf("lab: %w", err)
	}
	return fileOffset(st.Clock.TickGPA, g)
}

// fileOffset is where a guest physical address is in the memory file: a guest
// with more memory than fits below 4 GiB has the rest from there on. The limits
// are QEMU's: hw/i386/pc_piix.c and pc_q35.c.
func fileOffset(gpa uint64, g Guest) (int64, error) {
	const high = 4 << 30
	fits, low := int64(3584<<20), int64(3<<30)
	if strings.Contains(g.Machine, "q35") {
		fits, low = 2816<<20, 2<<30
	}
	off := int64(gpa)
	if g.Memory >= fits && off >= high {
		off -= high - low
	}
	if gpa == 0 || off < 0 || off >= g.Memory {
		return 0, fmt.Errorf("lab: guest %s ticks at address %#x, which is not in its memory", g.Name, gpa)
	}
	return off, nil
}

// awaitReady waits until a guest that was just started is at work.
func (l *Lab) awaitReady(ctx context.Context, g Guest) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := l.ready(ctx, g)
		if err == nil {
			return nil
		}
		if gone := l.stopped(ctx, g); gone != nil {
			return gone
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("lab: guest %s is not ready: %w: %w", g.Name, ctx.Err(), err)
		}
	}
}

func (l *Lab) ready(ctx context.Context, g Guest) error {
	if g.Kind == Flat {
		f, err := l.OpenMemory(g.Host, g)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := flat.ReadState(f)
		if err == nil {
			err = st.Err()
		}
		return err
	}
	// Nobody answers until the guest is up: a try must not last.
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := l.Control(ctx, g)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Do(ctx, control.Request{Do: control.GetStatus})
	return err
}

// stopped says that a guest that was started does not run any more.
func (l *Lab) stopped(ctx context.Context, g Guest) error {
	if agent, err := l.AgentRuns(g.Host); err != nil {
		return err
	} else if !agent {
		states, err := l.states(ctx, g.Host)
		if state, ok := states[g.Name]; err != nil || ok && state != "stopped" {
			return err
		}
		return fmt.Errorf("guest %s has ended: see %s", g.Name, l.Outside(g.Host, "/var/log/libvirt/qemu/"+g.Name+".log"))
	}
	return l.WithAgent(g.Host, func(c *api.Client) error {
		shown, err := c.Guests.Show(ctx, &lmctlv1.GuestRequest{Name: g.Name})
		if err != nil {
			return nil // not what is asked here; waiting goes on
		}
		if shown.State == "stopped" {
			return errors.New("guest " + g.Name + " has ended: " + shown.GetEnd().GetCause() + " " + shown.GetEnd().GetDetail() + "; see " + shown.ConsoleLog + " and " + shown.LogPath)
		}
		return nil
	})
}
