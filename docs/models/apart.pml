/* What two receivers of a group hold when one commits points that the other lacks.

   A receiver has the point of its image and up to MOST that wait, since others may lack them; when
   both have a point they apply up to that one.  Behind END any commit may be lost, with the link or
   the process, so one may have many that the other lacks.  A member whose receiver has LAGS or more
   says END last, when the other has the point.  A receiver that is full applies its oldest to take
   another one: nothing waits for ever.

   Checked: there is always a point that both have, unless both had LAGS or more at once; and each cut
   comes to its end.  Each BUG_ is a mistake that gives a counterexample; WITNESS_LAST one that
   had LAGS said END last, and both got the point. */

#define LAGS 2
#define MOST 3
#ifndef CUTS
#define CUTS 7
#endif

byte image[2];
byte waiting[2];            /* how many */
byte queue[6];              /* of member m from m * MOST on */
bool apart, lagged, has;
byte k, i, j;

#define HAS(m, x) (image[m] == x || (waiting[m] > 0 && queue[m * MOST] == x) || \
  (waiting[m] > 1 && queue[m * MOST + 1] == x) || (waiting[m] > 2 && queue[m * MOST + 2] == x))
#define BOTH(x) (HAS(0, x) && HAS(1, x))

inline look() {
  has = 0;
  for (i : 0 .. CUTS) { if :: BOTH(i) -> has = 1 :: else fi };
  assert(has || apart)
}

inline commit(m) {                                     /* or it is lost */
  if
  :: true -> skip
  :: true ->
     if
     :: waiting[m] == MOST ->
#ifdef BUG_WAITS
        assert(0);                                     /* for ever */
#endif
        image[m] = queue[m * MOST];
        queue[m * MOST] = queue[m * MOST + 1];
        queue[m * MOST + 1] = queue[m * MOST + 2];
        waiting[m]--
     :: else
     fi;
     queue[m * MOST + waiting[m]] = k;
     waiting[m]++
  fi
}

inline end(first, last) {
  commit(first);
  if
#ifndef BUG_ALL_AT_ONCE
  :: waiting[last] >= LAGS && waiting[first] < LAGS && !HAS(first, k) -> skip
  :: waiting[last] >= LAGS && waiting[first] >= LAGS && !HAS(first, k) -> apart = 1; commit(last)
  :: else -> commit(last)
#else
  :: true -> commit(last)
#endif
  fi
}

active proctype Group() {
  d_step { image[0] = 0; image[1] = 0 };
  for (k : 1 .. CUTS) {
    atomic {
      lagged = lagged || waiting[0] >= LAGS || waiting[1] >= LAGS;
      if
      :: waiting[0] >= LAGS && waiting[1] >= LAGS -> apart = 1
      :: else
      fi;
      if
      :: waiting[0] >= LAGS -> end(1, 0)
      :: waiting[0] < LAGS -> end(0, 1)
      fi;
      look();
      if
      :: BOTH(k) ->
#ifdef WITNESS_LAST
         assert(!lagged || apart);
#endif
         image[0] = k; image[1] = k; waiting[0] = 0; waiting[1] = 0; apart = 0; lagged = 0
      :: else
      fi
    }
  }
}
