package batch

import (
	"cmp"
	"fmt"
	"time"

	"vddkcp/internal/bytesize"
)

// Expected is what is known of a job before it runs.
type Expected struct {
	Job   *Job
	Bytes int64   // to copy
	Rate  float64 // bytes a second, when it runs alone
}

// Estimated is how a batch will go.
type Estimated struct {
	Time  time.Duration
	Binds string // what it waits for most
	Last  *Job   // which ends last; nil: there is none
}

// Estimate plays a batch through: jobs start as Run starts them, each goes on at
// its rate, and all together at limits.rate at most. That disks of one host slow
// each other down is not known to it.
func Estimate(jobs []Expected, limits Limits) Estimated {
	limits.Total = cmp.Or(limits.Total, DefaultTotal)
	r := &run{o: Options{Limits: limits}, servers: map[string]int{}, hosts: map[string]int{}}
	byJob := make(map[*Job]Expected, len(jobs))
	var queue []*attempt
	for _, e := range jobs {
		byJob[e.Job] = e
		queue = append(queue, &attempt{job: e.Job})
	}
	queue = longestFirst(queue, func(j *Job) int64 { return byJob[j].Bytes })
	type running struct {
		job  *Job
		left float64 // bytes
		rate float64
	}
	var active []*running
	var seconds float64
	var result Estimated
	waits := map[string]float64{} // seconds in which that was the bound
	for {
		for len(active) < limits.Total {
			i := 0
			for i < len(queue) && !r.fits(queue[i].job) {
				i++
			}
			if i == len(queue) {
				break
			}
			j := queue[i].job
			queue = append(queue[:i:i], queue[i+1:]...)
			r.occupy(j, 1)
			active = append(active, &running{j, float64(byJob[j].Bytes), max(byJob[j].Rate, 1)})
		}
		if len(active) == 0 {
			break
		}
		sum := 0.0
		for _, a := range active {
			sum += a.rate
		}
		share, bound := 1.0, "each disk's own rate binds it"
		switch {
		case limits.Rate > 0 && sum > float64(limits.Rate):
			share, bound = float64(limits.Rate)/sum, fmt.Sprintf("limits.rate, %s/s, binds it", bytesize.Format(limits.Rate))
		case len(queue) > 0 && len(active) == limits.Total:
			bound = fmt.Sprintf("limits.total, %d disks at once, binds it", limits.Total)
		case len(queue) > 0:
			bound = "limits.per_server or limits.per_host binds it"
		}
		next := active[0].left / (active[0].rate * share)
		for _, a := range active {
			next = min(next, a.left/(a.rate*share))
		}
		seconds += next
		waits[bound] += next
		still := active[:0:0]
		for _, a := range active {
			if a.left -= a.rate * share * next; a.left < 1 {
				r.occupy(a.job, -1)
				result.Last = a.job
			} else {
				still = append(still, a)
			}
		}
		active = still
	}
	result.Time = time.Duration(seconds * float64(time.Second))
	most := -1.0
	for bound, time := range waits {
		if time > most || time == most && bound < result.Binds {
			most, result.Binds = time, bound
		}
	}
	return result
}
