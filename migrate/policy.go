package migrate

import "time"

// Policy decides, after each live pass, whether another one is worth it. It
// is pure: it sees measurements and keeps a little history, and does nothing.
type Policy struct {
	MaxPasses      int
	DowntimeTarget time.Duration

	history []PassOutcome
}

// PassOutcome is what a pass has measured.
type PassOutcome struct {
	Sent       int64   // pages sent
	DirtyAfter int64   // pages written again by the end of the pass
	Speed      float64 // pages a second that the streams carried, without any bandwidth limit; 0 if too little was sent to tell
}

// shrinkBy is by how much a pass has to reduce what is left in order to count
// as progress: below a tenth it is within the noise of a steady writer.
const shrinkBy = 0.1

// speedless is taken for the speed of the streams as long as nothing has been
// measured: 100 MiB/s, which every network that is fit for this carries.
const speedless = 100 << 20 / PageSize

// Next returns the reason to switch over after the pass just finished, or an
// empty reason for another pass.
func (p *Policy) Next(o PassOutcome) SwitchoverReason {
	p.history = append(p.history, o)
	n := len(p.history)
	if time.Duration(float64(o.DirtyAfter)/p.speed()*float64(time.Second)) <= p.DowntimeTarget {
		return Converged
	}
	if n >= p.MaxPasses {
		return MaxPasses
	}
	if n >= 3 && p.stalled(n-1) && p.stalled(n-2) {
		return NotShrinking
	}
	return ""
}

// stalled says that pass i left about as much behind as the pass before it. A
// single one may be a burst; two in a row are the guest's steady state.
func (p *Policy) stalled(i int) bool {
	before, after := p.history[i-1].DirtyAfter, p.history[i].DirtyAfter
	return float64(after) > (1-shrinkBy)*float64(before)
}

// speed is the newest measured speed: the network's state now, not its best.
func (p *Policy) speed() float64 {
	for i := len(p.history) - 1; i >= 0; i-- {
		if s := p.history[i].Speed; s > 0 {
			return s
		}
	}
	return speedless
}
