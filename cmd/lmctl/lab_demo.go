package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/guest/client"
	"github.com/lmctl/lmctl/guest/control"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/migrate"
)

const demoLong = `Makes a lab of two hosts, starts a Linux guest that writes memory, opens a TCP
connection to it and pings it 1000 times a second from a client, and moves it
there and back. Then it says what the client has noticed, and removes all of it.`

// demo is one run of the demonstration.
type demo struct {
	*labOptions
	count  int // of migrations
	memory string
	rate   dirtyRate
	verify bool
	runs   lab.Hypervisor
	lab    *lab.Lab
	guest  lab.Guest
}

const (
	demoGuest = "demo"                // the guest's name
	demoDir   = "/var/lib/lmctl/demo" // the folder of the lab, which is removed at the end
)

func newLabDemoCommand(l *labOptions) *cobra.Command {
	d := demo{labOptions: l, rate: 50 << 20}
	cmd := &cobra.Command{
		Use: "demo", Short: "Watch a guest move with its connections", Long: demoLong, Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := demoNeeds(); err != nil {
				return err
			}
			if !cmd.Flags().Changed("state-dir") {
				d.dir = demoDir // not where a lab may be that is to stay
			}
			ctx, stop := interruptible(cmd.Context())
			defer stop()
			return d.inLab(ctx)
		},
	}
	cmd.Flags().IntVar(&d.count, "migrations", 2, "how many times the guest moves, there and back in turn")
	cmd.Flags().StringVar(&d.memory, "memory", "512MiB", "the guest's memory")
	cmd.Flags().Var(&d.rate, "dirty-rate", "how much memory the guest writes a second, or max")
	addHypervisorFlag(cmd, &d.runs)
	cmd.Flags().BoolVar(&d.verify, "verify", false, "compare every page at each switchover, which makes the pause longer")
	return cmd
}

// demoNeeds says in one line why this machine cannot show the demo.
func demoNeeds() error {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes network namespaces and mounts: run it as root")
	}
	if err := dirtymap.Probe(); err != nil {
		return fmt.Errorf("the demo needs a kernel that tracks dirty pages, Linux 6.7 or later: %w", err)
	}
	return nil
}

// inLab makes a lab of its own for the demo and removes it again, however the
// demo ends.
func (d *demo) inLab(ctx context.Context) (err error) {
	if d.count < 1 {
		return usagef("--migrations %d: one is the least", d.count)
	}
	if d.runs == lab.Libvirt {
		d.say("making two hosts, each with a libvirtd, and a client")
	} else {
		d.say("making two hosts and a client")
	}
	var end func() error
	if d.lab, end, err = lab.Fresh(ctx, lab.Options{Dir: d.dir, Hosts: 2, Hypervisor: d.runs}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	spec := lab.GuestSpec{Name: demoGuest, Kind: lab.Linux, Host: lab.HostName(1), DirtyRate: int64(d.rate)}
	if spec.Memory, err = parseSize(d.memory); err != nil {
		return &usageError{fmt.Errorf("--memory: %w", err)}
	}
	spec.DiskSetting.Rate = 20
	d.say("booting a Linux guest of " + d.memory + " that writes " + d.rate.String())
	if d.guest, err = d.lab.StartGuest(ctx, spec, d.say); err != nil {
		return err
	}
	return d.underLoad(ctx)
}

// demoReport is what the demo ends with.
type demoReport struct {
	Migrations []migrate.Report `json:"migrations"`
	TCP        client.Numbered  `json:"tcp"`
	UDP        client.Pinged    `json:"udp"`
	Guest      lab.Verdict      `json:"guest"`
}

// underLoad moves the guest while clients use it.
func (d *demo) underLoad(ctx context.Context) error {
	tcp, err := d.lab.DialGuest(ctx, d.guest, "tcp", control.NumberedPort)
	if err != nil {
		return err
	}
	udp, err := d.lab.DialGuest(ctx, d.guest, "udp", control.EchoPort)
	if err != nil {
		return errors.Join(err, tcp.Close())
	}
	var r demoReport
	load, stop := context.WithCancel(ctx)
	defer stop()
	var group errgroup.Group
	group.Go(func() (err error) { r.TCP, err = client.Number(load, tcp, 5*time.Millisecond); return err })
	group.Go(func() (err error) { r.UDP, err = client.Ping(load, udp, time.Millisecond); return err })
	err = d.move(ctx, &r)
	stop()
	if err := errors.Join(err, group.Wait()); err != nil {
		return err
	}
	if r.Guest, err = d.lab.CheckGuest(ctx, demoGuest); err != nil {
		return err
	}
	return d.conclude(&r)
}

// move moves the guest there and back, and notes each report.
func (d *demo) move(ctx context.Context, r *demoReport) error {
	for i := range d.count {
		from, to := lab.HostName(1+i%2), lab.HostName(2-i%2)
		if !d.json {
			fmt.Fprintf(d.out, "\n$ lmctl migrate %s %s\n", demoGuest, to)
		}
		if err := d.lab.WithAgent(from, func(c *api.Client) error {
			report, err := d.moveOnce(ctx, c, to)
			if err == nil {
				r.Migrations = append(r.Migrations, report)
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) moveOnce(ctx context.Context, c *api.Client, to string) (migrate.Report, error) {
	var report migrate.Report
	m, err := c.Migrations.Start(ctx, &lmctlv1.StartMigrationRequest{
		Guest: demoGuest, Destination: to, Options: &lmctlv1.MigrationOptions{Verify: d.verify},
	})
	if err != nil {
		return report, err
	}
	quiet := *d.options
	if d.json {
		quiet.out = io.Discard // one object on standard output, at the end
	}
	if err := quiet.follow(ctx, c, m.Id, nil); err != nil {
		return report, err
	}
	if m, err = c.Migrations.Show(ctx, &lmctlv1.MigrationRequest{Id: m.Id}); err != nil {
		return report, err
	}
	if err := json.Unmarshal(m.Report, &report); err != nil {
		return report, fmt.Errorf("read the report of migration %s: %w", m.Id, err)
	}
	return report, nil
}

// conclude prints what has come of it. What a client lost is an error.
func (d *demo) conclude(r *demoReport) error {
	if d.json {
		if err := printJSON(d.out, r); err != nil {
			return err
		}
	} else if err := d.printConclusion(r); err != nil {
		return err
	}
	switch {
	case !r.Guest.OK:
		return fmt.Errorf("the guest is not well: %q", r.Guest.Problems)
	case !r.TCP.Whole():
		return fmt.Errorf("the connection has suffered: %d replies lost, %d doubled, %d out of order", r.TCP.Lost, r.TCP.Doubled, r.TCP.Unordered)
	case r.UDP.Doubled > 0:
		return fmt.Errorf("%d datagrams were answered twice", r.UDP.Doubled)
	}
	return nil
}

func (d *demo) printConclusion(r *demoReport) error {
	var passes int
	var sent int64
	var longest time.Duration
	for _, m := range r.Migrations {
		passes += len(m.Passes)
		sent += m.BytesSent
		longest = max(longest, m.Downtime)
	}
	health := "whole: every page as it was written, and every disk record that was synced"
	if !r.Guest.OK {
		health = fmt.Sprintf("not well: %q", r.Guest.Problems)
	}
	if _, err := fmt.Fprintln(d.out); err != nil {
		return err
	}
	return printFields(d.out,
		"migrations", fmt.Sprintf("%d, %d passes, %s sent", len(r.Migrations), passes, size(sent)),
		"longest downtime", brief(longest),
		"longest gap, TCP", brief(r.TCP.Gap.Length)+" between two replies (one every 5ms is asked for)",
		"longest gap, UDP", brief(r.UDP.Gap.Length)+" between two answers (one every 1ms is asked for)",
		"TCP", fmt.Sprintf("one connection all along: %d requests, %d replies lost, %d doubled", r.TCP.Sent, r.TCP.Lost, r.TCP.Doubled),
		"UDP", fmt.Sprintf("%d datagrams, %d lost, %d doubled", r.UDP.Sent, r.UDP.Lost, r.UDP.Doubled),
		"guest", health)
}
