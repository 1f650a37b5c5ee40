package labtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/migrate"
)

// Guest asks a host's agent for a guest, nil if it has none of that name.
func (c *Cluster) Guest(host, name string) (*lmctlv1.Guest, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	list, err := c.Clients[host].Guests.List(ctx, &lmctlv1.ListGuestsRequest{})
	if err != nil {
		return nil, err
	}
	for _, g := range list.Guests {
		if g.Name == name {
			return g, nil
		}
	}
	return nil, nil
}

// Begin starts a migration and returns its id.
func (c *Cluster) Begin(guest, from, to string, options *lmctlv1.MigrationOptions) (string, error) {
	m, err := c.Clients[from].Migrations.Start(c.T.Context(), &lmctlv1.StartMigrationRequest{Guest: guest, Destination: to, Options: options})
	if err != nil {
		return "", err
	}
	return m.Id, nil
}

// Follow watches a migration until it is over, or until enough has been seen.
func (c *Cluster) Follow(host, id string, enough func(*lmctlv1.Migration) bool) (*lmctlv1.Migration, error) {
	stream, err := c.Clients[host].Migrations.Watch(c.Context(), &lmctlv1.MigrationRequest{Id: id})
	if err != nil {
		return nil, err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("watch migration %s: %w", id, err)
		}
		if m.Finished || enough(m) {
			return m, nil
		}
	}
}

// Wait waits for a migration's end and returns its report.
func (c *Cluster) Wait(host, id string) (*migrate.Report, error) {
	m, err := c.Follow(host, id, func(*lmctlv1.Migration) bool { return false })
	if err != nil {
		return nil, err
	}
	var r migrate.Report
	return &r, json.Unmarshal(m.Report, &r)
}

// failpoints is where the agents of a lab look for the states that they are to
// stop at.
func failpoints(lab string) string { return lab + ".failpoints" }

// Point is a state of a migration, on one side, that agents can be held at.
type Point struct {
	Role  string // source or destination
	State migrate.State
}

func (p Point) String() string { return p.Role + "." + string(p.State) }

// Points are all states of a migration that succeeds.
func Points() []Point {
	var all []Point
	for _, s := range []migrate.State{
		migrate.SourcePreparing, migrate.SourceTracking, migrate.SourceCopying, migrate.SourceSuspending,
		migrate.SourceFinalCopy, migrate.SourceReadyWait, migrate.SourceCommitting, migrate.SourceCommitted,
		migrate.SourceHandedOver, migrate.SourceReleasing,
	} {
		all = append(all, Point{"source", s})
	}
	for _, s := range []migrate.State{
		migrate.DestPreparing, migrate.DestReceiving, migrate.DestFinal, migrate.DestLoading,
		migrate.DestReady, migrate.DestAccepted, migrate.DestRunning, migrate.DestOwned,
	} {
		all = append(all, Point{"destination", s})
	}
	return all
}

// Held is the file by which agents stop at a point.
type Held string

// Hold has the lab's agents stop at a point, until they are released.
func (c *Cluster) Hold(p Point) Held {
	c.T.Helper()
	file := filepath.Join(failpoints(c.Lab.Dir()), p.String())
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		c.T.Fatal(err)
	}
	return Held(file)
}

// Reached waits until an agent has stopped there.
func (c *Cluster) Reached(h Held) {
	c.T.Helper()
	c.Eventually("the migration reaches "+filepath.Base(string(h)), func() error {
		_, err := os.Stat(string(h) + ".reached")
		return err
	})
}

// Release lets it go on. It may be repeated.
func (c *Cluster) Release(h Held) {
	c.T.Helper()
	for _, file := range []string{string(h), string(h) + ".reached"} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			c.T.Error(err)
		}
	}
}
