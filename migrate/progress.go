package migrate

import "time"

// observeEvery is how often the observer hears of a pass under way.
const observeEvery = 200 * time.Millisecond

// watch tells the observer of progress until the returned function is called.
func (m *source) watch() (stop func()) {
	if m.job.Observe == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(observeEvery)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				m.observe()
			}
		}
	}()
	return func() { close(quit); <-done }
}

// observe hands the observer a snapshot.
func (m *source) observe() {
	if m.job.Observe != nil {
		m.job.Observe(m.progress())
	}
}

func (m *source) progress() Progress {
	p := Progress{State: m.state.Load().(State), Passes: *m.passes.Load()}
	began := m.passTime.Load()
	if began == 0 {
		return p
	}
	// The streams exist since before passTime was first set.
	p.Pass = len(p.Passes)
	if p.State == SourceCopying {
		p.Pass++
	}
	p.PassPages = m.passSize.Load()
	p.CopiedPages = min(m.streams.copied.Load(), p.PassPages)
	p.BytesSent = m.streams.sent.Load()
	if elapsed := time.Since(time.Unix(0, began)).Seconds(); elapsed > 0 {
		p.Rate = float64(p.BytesSent-m.passFrom.Load()) / elapsed
	}
	return p
}
