"""Define the tables of people.sqlite and the steps from one version of them to the next."""

VERSION = 2
"""Version of the tables (`PRAGMA user_version`)."""

FIRST = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE labelers(
    id INTEGER PRIMARY KEY,
    code TEXT NOT NULL UNIQUE,        -- in the data: "L3", or a word that the person chose
    name TEXT NOT NULL,               -- for the lead's page only
    key_hash TEXT NOT NULL UNIQUE,    -- of the random key that the browser keeps
    created REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'active' CHECK(state IN ('active', 'stopped'))
) STRICT;

CREATE TABLE tasks(
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,         -- digest of prompt, answers and models
    prompt TEXT NOT NULL,             -- JSON: a string, or messages
    kind TEXT,
    user_id TEXT,
    known TEXT,                       -- JSON: tiers of positions with a known answer
    source TEXT NOT NULL,             -- JSON: models, sampling settings, where it comes from
    created REAL NOT NULL,
    round INTEGER NOT NULL DEFAULT 1
) STRICT;

CREATE TABLE answers(
    id INTEGER PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks(id),
    position INTEGER NOT NULL,        -- in the task; what a labeler sees is assignments.order_shown
    text TEXT NOT NULL,
    finished INTEGER NOT NULL,
    models TEXT NOT NULL,             -- JSON: all that gave this text
    model_settings TEXT NOT NULL,     -- JSON: of each of them
    UNIQUE(task_id, position)
) STRICT;

CREATE TABLE assignments(
    id INTEGER PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks(id),
    labeler_id INTEGER NOT NULL REFERENCES labelers(id),
    order_shown TEXT NOT NULL,        -- JSON: ids of answers
    reason TEXT NOT NULL CHECK(reason IN ('first', 'overlap', 'repeat', 'known')),
    state TEXT NOT NULL CHECK(state IN ('open', 'done', 'skipped', 'abandoned', 'sent_back')),
    opened REAL NOT NULL,
    touched REAL NOT NULL,
    closed REAL,
    seconds REAL NOT NULL DEFAULT 0,  -- of work, without idle time
    number INTEGER NOT NULL,          -- running number of the labeler's assignments
    guidelines TEXT,                  -- digest of the guidelines in view
    UNIQUE(labeler_id, number)
) STRICT;
CREATE INDEX assignments_by_task ON assignments(task_id, state);
CREATE INDEX assignments_by_labeler ON assignments(labeler_id, state, touched);
CREATE INDEX assignments_by_state ON assignments(state, touched);

CREATE TABLE moves(
    id INTEGER PRIMARY KEY,
    assignment_id INTEGER NOT NULL REFERENCES assignments(id),
    seq INTEGER NOT NULL,             -- a second tab with an old number gets a conflict
    kind TEXT NOT NULL,
    body TEXT NOT NULL,               -- JSON
    made REAL NOT NULL,
    client_id TEXT,                   -- of the page, so that a retry does nothing twice
    UNIQUE(assignment_id, seq)
) STRICT;

CREATE TABLE verdicts(
    id INTEGER PRIMARY KEY,
    assignment_id INTEGER NOT NULL UNIQUE REFERENCES assignments(id),
    tiers TEXT NOT NULL,              -- JSON: ids of answers, the best tier first
    set_aside TEXT NOT NULL,          -- JSON: ids that cannot be judged
    skipped TEXT,                     -- why all of it was skipped
    likert TEXT NOT NULL,             -- JSON: {id: {overall, flags}}
    confidence INTEGER CHECK(confidence BETWEEN 1 AND 5),
    note TEXT NOT NULL DEFAULT '',
    made REAL NOT NULL,
    accepted TEXT NOT NULL DEFAULT 'pending' CHECK(accepted IN ('pending', 'accepted', 'excluded'))
) STRICT;

CREATE TABLE conversations(
    id INTEGER PRIMARY KEY,
    labeler_id INTEGER REFERENCES labelers(id),
    user_id TEXT NOT NULL,
    consent INTEGER NOT NULL,
    system TEXT NOT NULL DEFAULT '',
    kind TEXT,
    settings TEXT NOT NULL,           -- JSON
    created REAL NOT NULL
) STRICT;

CREATE TABLE turns(
    id INTEGER PRIMARY KEY,
    conversation_id INTEGER NOT NULL REFERENCES conversations(id),
    seq INTEGER NOT NULL,
    side INTEGER NOT NULL DEFAULT 0,  -- of answers side by side
    role TEXT NOT NULL CHECK(role IN ('user', 'assistant')),
    content TEXT NOT NULL,
    model TEXT,
    seed INTEGER,
    score REAL,
    finished INTEGER,
    settings TEXT,                    -- JSON: temperature, top_p, ... of this answer
    made REAL NOT NULL,
    UNIQUE(conversation_id, seq, side)
) STRICT;

CREATE TABLE choices(
    id INTEGER PRIMARY KEY,
    conversation_id INTEGER NOT NULL REFERENCES conversations(id),
    seq INTEGER NOT NULL,             -- of the answers compared
    tiers TEXT NOT NULL,              -- JSON: ids of turns, the best tier first
    made REAL NOT NULL,
    UNIQUE(conversation_id, seq)
) STRICT;

CREATE TABLE thumbs(
    id INTEGER PRIMARY KEY,
    turn_id INTEGER NOT NULL UNIQUE REFERENCES turns(id),
    up INTEGER NOT NULL,
    made REAL NOT NULL
) STRICT;

CREATE TABLE corrections(
    id INTEGER PRIMARY KEY,
    turn_id INTEGER NOT NULL UNIQUE REFERENCES turns(id),
    text TEXT NOT NULL,
    made REAL NOT NULL
) STRICT;
"""

DECISIONS = """
ALTER TABLE verdicts ADD COLUMN message TEXT NOT NULL DEFAULT '';
ALTER TABLE verdicts ADD COLUMN sent_back INTEGER NOT NULL DEFAULT 0;
"""
"""What the lead wrote with the last decision, and whether that was to send the task back."""

STEPS: dict[int, str] = {0: FIRST, 1: DECISIONS}
"""Version → the statements that lead to the next one; 0 is an empty file."""
