package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/lmctl/lmctl/migrate"
)

// metrics are what the agent measures, for Prometheus.
type metrics struct {
	registry   *prometheus.Registry
	migrations *prometheus.CounterVec
	passes     prometheus.Counter
	bytes      prometheus.Counter
	pages      *prometheus.CounterVec
	downtime   prometheus.Histogram
	total      prometheus.Histogram
	dirtyRate  *prometheus.GaugeVec
}

func newMetrics(a *Agent) *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	m.migrations = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "lmctl_migrations_total", Help: "Migrations away from this host, by result."}, []string{"result"})
	m.passes = prometheus.NewCounter(prometheus.CounterOpts{Name: "lmctl_migration_passes_total", Help: "Live passes of migrations away from this host."})
	m.bytes = prometheus.NewCounter(prometheus.CounterOpts{Name: "lmctl_migration_sent_bytes_total", Help: "Bytes sent by migrations away from this host, before TLS."})
	m.pages = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "lmctl_migration_pages_total", Help: "Pages sent by migrations away from this host, by kind."}, []string{"kind"})
	m.downtime = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "lmctl_migration_downtime_seconds", Help: "Pause of guests that moved away from this host.",
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 14)})
	m.total = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "lmctl_migration_duration_seconds", Help: "Whole duration of migrations away from this host.",
		Buckets: prometheus.ExponentialBuckets(0.1, 2, 14)})
	m.dirtyRate = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "lmctl_guest_dirty_bytes_per_second", Help: "Memory that a guest wrote, over the last pass of its last migration away from this host."}, []string{"guest"})
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "lmctl_agent_info", Help: "Always 1; the labels say which agent this is.",
		ConstLabels: prometheus.Labels{"host": a.cfg.Name, "version": a.version}})
	info.Set(1)
	m.registry.MustRegister(m.migrations, m.passes, m.bytes, m.pages, m.downtime, m.total, m.dirtyRate, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), guestCollector{a})
	for _, r := range []migrate.Result{migrate.Completed, migrate.Refused, migrate.Failed, migrate.Cancelled, migrate.InDoubt} {
		m.migrations.WithLabelValues(string(r))
	}
	return m
}

// counted is how much of one migration is in the counters already.
type counted struct {
	passes int
	bytes  int64
}

// moving counts what a migration has done since it was counted last.
func (m *metrics) moving(c *counted, guest string, passes []migrate.Pass, bytes int64) {
	if bytes > c.bytes {
		m.bytes.Add(float64(bytes - c.bytes))
		c.bytes = bytes
	}
	if len(passes) <= c.passes {
		return
	}
	for _, p := range passes[c.passes:] {
		m.passes.Inc()
		m.pages.WithLabelValues("zero").Add(float64(p.ZeroPages))
		m.pages.WithLabelValues("data").Add(float64(p.Pages - p.ZeroPages))
	}
	c.passes = len(passes)
	if last := passes[len(passes)-1]; last.Duration > 0 {
		m.dirtyRate.WithLabelValues(guest).Set(float64(last.DirtyAfter*migrate.PageSize) / last.Duration.Seconds())
	}
}

// migrated counts a migration that has ended.
func (m *metrics) migrated(c *counted, r *migrate.Report) {
	m.moving(c, r.Guest, r.Passes, r.BytesSent)
	m.migrations.WithLabelValues(string(r.Result)).Inc()
	m.total.Observe(r.Total.Seconds())
	m.pages.WithLabelValues("final").Add(float64(r.DowntimeParts.FinalPages))
	if r.Result == migrate.Completed {
		m.left(r.Guest)
	}
	if r.Result == migrate.Completed {
		m.downtime.Observe(r.Downtime.Seconds())
	}
}

// left forgets a guest that this host does not have any more.
func (m *metrics) left(guest string) { m.dirtyRate.DeleteLabelValues(guest) }

// guestCollector counts guests by state when it is asked.
type guestCollector struct{ a *Agent }

var guestsDesc = prometheus.NewDesc("lmctl_guests", "Guests of this host, by state.", []string{"state"}, nil)

// Describe implements prometheus.Collector.
func (c guestCollector) Describe(ch chan<- *prometheus.Desc) { ch <- guestsDesc }

// Collect implements prometheus.Collector.
func (c guestCollector) Collect(ch chan<- prometheus.Metric) {
	counts := map[string]int{"stopped": 0, "running": 0, "paused": 0, "migrating": 0, "incoming": 0, stateInDoubt: 0}
	list, err := (&guestService{a: c.a}).List(context.Background(), nil)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(guestsDesc, err)
		return
	}
	for _, g := range list.GetGuests() {
		counts[g.GetState()]++
	}
	for state, n := range counts {
		ch <- prometheus.MustNewConstMetric(guestsDesc, prometheus.GaugeValue, float64(n), state)
	}
}

// listen serves the metrics at an address of the configuration until the
// result is closed.
func (m *metrics) listen(addr string) (io.Closer, error) {
	if addr == "" {
		return io.NopCloser(nil), nil
	}
	network := "tcp"
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("agent: metrics: %w", err)
		}
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		return nil, fmt.Errorf("agent: metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	s := &metricsServer{server: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}, done: make(chan error, 1)}
	go func() { s.done <- s.server.Serve(ln) }()
	return s, nil
}

type metricsServer struct {
	server *http.Server
	done   chan error
}

// Close ends the serving.
func (s *metricsServer) Close() error {
	err := s.server.Close()
	if served := <-s.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, fmt.Errorf("agent: metrics: %w", served))
	}
	return err
}
